//! `bulkhead ps`: the processes of a container. For a person, those that run in the machine, as it
//! numbers them; for a caller who looks for them on the host (JSON), those that stand for them there.

use std::io::Write;

use anyhow::{Context, bail, ensure};
use bulkhead_protocol::agent::{ProcessInfo, ProcessesReply};
use containerd_shim_protos::api::PidsRequest;
use prost::Message;

use super::args::{Global, Ps, PsFormat};
use super::client;
use crate::containerd::task::PROCESSES;
use crate::state::Home;
use crate::state::timestamp;
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
    if home.read()?.observed() == Status::Stopped {
        bail!("container not running");
    }
    let mut told = client::runtime()?.block_on(async {
        let request = PidsRequest { id: ps.id.to_string(), ..Default::default() };
        let client = client::connect(&home)?;
        client.pids(client::unbounded(), &request).await.map_err(client::words)
    })?;
    let mut out = std::io::stdout().lock();
    if ps.format == PsFormat::Json {
        let pids: Vec<u32> = told.processes.iter().map(|process| process.pid).collect();
        writeln!(out, "{}", serde_json::to_string(&pids)?)?;
        return Ok(());
    }
    let now = timestamp::now_ns();
    writeln!(out, "{}", line(["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]))?;
    let info = told.processes.first_mut().and_then(|first| first.info.take());
    let info = info.filter(|info| info.type_url == PROCESSES);
    let info = info.context("the supervisor tells nothing of the processes")?;
    for process in ProcessesReply::decode(info.value.as_slice())?.processes {
        writeln!(out, "{}", row(&process, now))?;
    }
    Ok(())
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
    // What a program calls itself shall not move the cursor.
    let command: String = process
        .command
        .chars()
        .map(|letter| if letter.is_control() { '?' } else { letter })
        .collect();
    line([
        &process.uid.to_string(),
        &process.pid.to_string(),
        &process.parent.to_string(),
        &share.to_string(),
        &timestamp::short(process.started_at_ns, now_ns),
        &terminal(process.terminal),
        &format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        &command,
    ])
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
        let expected = "5              7       1 99 22:13 pts/3    01:01:01 sh -c?exit";
        assert_eq!(row(&process, now), expected);
    }

    #[test]
    fn a_process_without_a_terminal_has_a_question_mark() {
        assert_eq!(terminal(0), "?");
        assert_eq!(terminal(4 << 8 | 64), "4:64");
        assert_eq!(terminal(137 << 8 | 1), "pts/257");
    }
}
