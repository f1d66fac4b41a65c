//! `bulkhead ps`: the processes of a container; one that has stopped has none. The table, for a
//! person, shows those that run in the machine, by their pids there; JSON, for a caller who looks
//! for them on the host, shows the stand-ins.

use std::io::Write;

use anyhow::{Context, ensure};
use bulkhead_protocol::agent::{ProcessInfo, ProcessesReply};
use containerd_shim_protos::api::{PidsRequest, PidsResponse};
use prost::Message;

use super::args::{Global, Ps, PsFormat};
use super::client;
use crate::containerd::task::PROCESSES;
use crate::machine::words::printable;
use crate::state::Home;
use crate::state::timestamp;
use crate::state::users;
use crate::supervisor::lifecycle::Status;

pub(super) fn ps(global: &Global, ps: &Ps) -> anyhow::Result<()> {
    ensure!(
        ps.options.is_empty(),
        "options of ps(1) are for processes of the host; leave {:?} out, or run ps inside: \
         \"bulkhead exec {} ps\"",
        ps.options.join(" "),
        ps.id
    );
    let home = Home::open(&global.root, &ps.id)?;
    let told = match home.read()?.observed() {
        Status::Stopped => None,
        _ => Some(ask(&home)?),
    };
    let mut out = std::io::stdout().lock();
    if ps.format == PsFormat::Json {
        let pids = told.map(|told| told.processes.iter().map(|it| it.pid).collect::<Vec<_>>());
        // An empty list is null in runc.
        writeln!(out, "{}", serde_json::to_string(&pids)?)?;
        return Ok(());
    }
    let now = timestamp::now_ns();
    writeln!(out, "{}", line(["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]))?;
    for process in told.map_or_else(|| Ok(Vec::new()), in_the_machine)? {
        writeln!(out, "{}", row(&process, now))?;
    }
    Ok(())
}

/// Asks a container's supervisor.
fn ask(home: &Home) -> anyhow::Result<PidsResponse> {
    client::runtime()?.block_on(async {
        let request = PidsRequest { id: home.id().to_string(), ..Default::default() };
        let client = client::connect(home)?;
        client.pids(client::unbounded(), &request).await.map_err(client::words(home))
    })
}

/// The processes as the machine knows them.
fn in_the_machine(mut told: PidsResponse) -> anyhow::Result<Vec<ProcessInfo>> {
    let info = told.processes.first_mut().and_then(|first| first.info.take());
    let info = info.filter(|info| info.type_url == PROCESSES);
    let info = info.context("the supervisor did not list the processes")?;
    Ok(ProcessesReply::decode(info.value.as_slice())?.processes)
}

/// The columns of `ps -ef`.
fn line(columns: [&str; 8]) -> String {
    let [uid, pid, parent, share, started, terminal, time, command] = columns;
    format!(
        "{uid:<8} {pid:>7} {parent:>7} {share:>2} {started:>5} {terminal:<8} {time:>8} {command}"
    )
}

fn row(process: &ProcessInfo, now_ns: u64) -> String {
    let seconds = process.cpu_ms / 1000;
    let lived_ms = now_ns.saturating_sub(process.started_at_ns) / 1_000_000;
    let share = (process.cpu_ms * 100).checked_div(lived_ms).unwrap_or(0).min(99);
    line([
        &shortened(users::name(process.uid)),
        &process.pid.to_string(),
        &process.parent.to_string(),
        &share.to_string(),
        &timestamp::short(process.started_at_ns, now_ns),
        &terminal(process.terminal),
        &format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        &printable(&process.command),
    ])
}

/// Shortens a name to the width of its column.
fn shortened(mut name: String) -> String {
    if name.chars().count() > 8 {
        name = name.chars().take(7).chain(['+']).collect();
    }
    name
}

/// The name of a terminal by its number, as the kernel packs it: Documentation/admin-guide/devices.txt.
fn terminal(number: u32) -> String {
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00);
    match major {
        0 => "?".to_owned(),
        136..=143 => format!("pts/{}", minor + (major - 136) * 256),
        _ => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_like_that_of_ps() {
        let now = 1_700_000_100_000_000_000;
        let process = ProcessInfo {
            pid: 7,
            parent: 1,
            uid: 5,
            cpu_ms: 3_661_000,
            started_at_ns: 1_700_000_000_000_000_000,
            terminal: 136 << 8 | 3,
            command: "sh -c\nexit".to_owned(),
        };
        let expected = "       7       1 99 22:13 pts/3    01:01:01 sh -c exit";
        assert_eq!(row(&process, now).split_at(8).1, expected);
        let root = ProcessInfo { uid: 0, ..process.clone() };
        assert!(row(&root, now).starts_with("root      "));
        let nobody_has_it = ProcessInfo { uid: 4_294_967_290, ..process };
        assert!(row(&nobody_has_it, now).starts_with("4294967+ "));
    }

    #[test]
    fn a_process_without_a_terminal_has_a_question_mark() {
        assert_eq!(terminal(0), "?");
        assert_eq!(terminal(4 << 8 | 64), "4:64");
        assert_eq!(terminal(137 << 8 | 1), "pts/257");
    }
}
