//! `bulkhead exec`: runs a further process in a container. In the foreground this process stands
//! for it; with `--detach` a stand-in stays behind.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::api::ExecProcessRequest;
use containerd_shim_protos::shim_async::TaskClient;
use oci_spec::runtime::{Capabilities, LinuxCapabilities, Process};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use ttrpc::proto::MESSAGE_LENGTH_MAX;

use super::args::{Exec, Global};
use super::client;
use super::create::{self, Looks};
use super::creation;
use super::signals;
use crate::bundle::{self, ProcessLimits};
use crate::containerd::task;
use crate::state::process::Process as StandIn;
use crate::state::socket_path::SocketPath;
use crate::state::{Home, State};
use crate::streams::preserved::Preserved;
use crate::streams::relay::{Belongings, Relay, Signals};
use crate::streams::terminal::Terminal;
use crate::supervisor::lifecycle::Status;
use crate::supervisor::pod;

/// The beginning of an error message, as callers of runc know it.
const FAILED: &str = "exec failed: unable to start container process";
/// How containerd calls the `process` object of a specification.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The largest process file that is read, in bytes.
const PROCESS_BYTES_MAX: u64 = 16 << 20;
/// The largest process that a call carries, in bytes; the message also holds names.
const CALL_BYTES_MAX: usize = MESSAGE_LENGTH_MAX - (64 << 10);

pub(super) fn exec(global: &Global, exec: &Exec, preserved: Preserved) -> anyhow::Result<ExitCode> {
    let home = Home::open(&global.root, &exec.id)?;
    let state = home.read()?;
    match state.observed() {
        Status::Created | Status::Running => {}
        status if status.is_paused() && exec.ignore_paused => {}
        status if status.is_paused() => {
            bail!("cannot exec in a paused container (use --ignore-paused to override)")
        }
        status => bail!("cannot exec in a container that is {status}"),
    }
    let process = process(exec, &state)?;
    let terminal = process.terminal() == Some(true);
    creation::check_console(terminal, !exec.detach, exec.console_socket.as_deref())?;
    let arguments = process.args().clone().unwrap_or_default();
    let process = serde_json::to_vec(&process)?;
    ensure!(
        process.len() <= CALL_BYTES_MAX,
        "the process has {} bytes as JSON; at most {CALL_BYTES_MAX} are supported",
        process.len()
    );
    let name = name()?;
    if exec.detach {
        return detached(exec, &home, (&name, process), (&arguments, &preserved));
    }
    let signals = Signals::hold()?;
    let terminal = if terminal { Some(Terminal::own()?) } else { None };
    let (mut relay, belongings) = (None, Belongings { terminal, preserved, home: None });
    let up = async {
        let client = prepare(&home, &name, process, exec.ignore_paused).await?;
        let connected = Relay::connect(SocketPath::attach(&home)?.path(), false, belongings)?;
        connected.attach(&name)?;
        relay = Some(connected);
        if let Some(path) = &exec.pid_file {
            client::write_pid_file(path, std::process::id())?;
        }
        client::start(&client, &home, &name).await.context(FAILED)
    };
    let early = client::runtime()?.block_on(async {
        tokio::select! {
            result = up => result.map(|()| None),
            signal = signals::fatal(&signals) => signal.map(Some),
        }
    })?;
    if let Some(signal) = early {
        // When its stand-in goes away, the process is killed.
        return Ok(ExitCode::from(128 + u8::try_from(signal).unwrap_or(0)));
    }
    let relay = relay.context("no stand-in")?;
    // The pid file names this process.
    relay.hide().context("empty root")?;
    let ended = relay.serve(&signals)?;
    if let Some(reason) = ended.reason {
        tracing::warn!(reason, "the process was killed");
    }
    Ok(ExitCode::from(ended.status))
}

fn detached(
    exec: &Exec,
    home: &Home,
    (name, process): (&str, Vec<u8>),
    (arguments, preserved): (&[String], &Preserved),
) -> anyhow::Result<ExitCode> {
    client::runtime()?.block_on(async {
        let client = prepare(home, name, process, exec.ignore_paused).await?;
        // The stand-in ends by itself when the process is not started.
        let console_socket = exec.console_socket.as_deref();
        let looks = Looks { arguments, console_socket, preserved };
        let pid = create::spawn_stand_in(home, name, None, &looks)?;
        client::start(&client, home, name).await.context(FAILED)?;
        if let Some(path) = &exec.pid_file
            && let Err(error) = client::write_pid_file(path, pid)
        {
            // This also kills the process that it stands for.
            let _ = StandIn::find(pid).is_ok_and(|it| it.kill_and_wait(creation::KILLED));
            return Err(error);
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Tells the supervisor what is to be started under this name.
async fn prepare(
    home: &Home,
    name: &str,
    process: Vec<u8>,
    ignore_paused: bool,
) -> anyhow::Result<TaskClient> {
    let client = client::connect(home)?;
    let mut spec = Any::new();
    spec.type_url = PROCESS_TYPE.to_owned();
    spec.value = process;
    let request = ExecProcessRequest {
        id: home.id().to_string(),
        exec_id: name.to_owned(),
        spec: MessageField::some(spec),
        ..Default::default()
    };
    let mut context = client::unbounded();
    if ignore_paused {
        context.add(task::IGNORE_PAUSED.to_owned(), "true".to_owned());
    }
    client.exec(context, &request).await.map_err(client::words(home))?;
    Ok(client)
}

/// A name that no other process of the container has.
fn name() -> anyhow::Result<String> {
    let mut random = [0; 8];
    pod::random(&mut random).context("/dev/urandom")?;
    Ok(format!("{:016x}", u64::from_ne_bytes(random)))
}

/// The process that is asked for: that of a file, or the container's own with the changes of the
/// options.
fn process(exec: &Exec, state: &State) -> anyhow::Result<Process> {
    let mut process = match &exec.process {
        Some(path) => {
            let mut process = read(path)?;
            if exec.tty {
                process.set_terminal(Some(true));
            }
            process
        }
        None => changed(exec, bundle::read(&state.bundle)?.spec.process().clone())?,
    };
    ensure!(
        process.args().as_ref().is_some_and(|args| !args.is_empty()),
        "no program to execute: name one after the container, or give a file with --process"
    );
    ensure!(
        process.cwd().is_absolute(),
        "the working directory {:?} is not an absolute path; begin it with '/'",
        process.cwd()
    );
    ensure!(exec.cgroup.is_none(), "--cgroup is not supported; leave it out");
    if exec.apparmor.is_some() || exec.process_label.is_some() {
        tracing::warn!(
            "AppArmor profiles and SELinux labels have no effect inside the machine and are ignored"
        );
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
    ProcessLimits::own().fill(&mut process);
    Ok(process)
}

fn read(path: &Path) -> anyhow::Result<Process> {
    let context = || format!("process file {}", path.display());
    let bytes = fs::metadata(path).with_context(context)?.len();
    ensure!(
        bytes <= PROCESS_BYTES_MAX,
        "process file {} has {bytes} bytes; at most {PROCESS_BYTES_MAX} are read",
        path.display()
    );
    bundle::read_process(&fs::read(path).with_context(context)?).with_context(context)
}

/// The container's own process with the changes that the options ask for, as runc makes them.
fn changed(exec: &Exec, process: Option<Process>) -> anyhow::Result<Process> {
    let mut process = process.context("config.json has no process")?;
    process.set_args(Some(exec.command.clone())).set_terminal(Some(exec.tty));
    if let Some(cwd) = &exec.cwd {
        process.set_cwd(cwd.clone());
    }
    if exec.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    let environment = process.env().clone().unwrap_or_default();
    process.set_env(Some(merged(environment, &exec.env)));
    if let Some(user) = &exec.user {
        let (uid, gid) = match user.split_once(':') {
            Some((uid, gid)) => (uid, Some(number(gid, "gid", user)?)),
            None => (user.as_str(), None),
        };
        let uid = number(uid, "uid", user)?;
        process.user_mut().set_uid(uid);
        if let Some(gid) = gid {
            process.user_mut().set_gid(gid);
        }
    }
    if !exec.additional_gids.is_empty() {
        let mut gids = process.user().additional_gids().clone().unwrap_or_default();
        gids.extend(&exec.additional_gids);
        process.user_mut().set_additional_gids(Some(gids));
    }
    if !exec.cap.is_empty() {
        let capabilities = process.capabilities().clone();
        process.set_capabilities(Some(with_more(capabilities, &exec.cap)));
    }
    Ok(process)
}

fn number(text: &str, what: &str, user: &str) -> anyhow::Result<u32> {
    text.parse().with_context(|| format!("--user {user:?}: {what} {text:?} is not a number"))
}

/// The last of several values of a variable counts.
fn merged(mut environment: Vec<String>, more: &[String]) -> Vec<String> {
    fn name(entry: &str) -> &str {
        entry.split_once('=').map_or(entry, |(name, _)| name)
    }
    for entry in more {
        environment.retain(|other| name(other) != name(entry));
        environment.push(entry.clone());
    }
    environment
}

/// Adds capabilities to a process: to its ambient set only if it has an inheritable set.
fn with_more(capabilities: Option<LinuxCapabilities>, names: &[String]) -> LinuxCapabilities {
    let (mut more, mut unknown) = (Capabilities::new(), Vec::new());
    for name in names {
        match bundle::capability(name) {
            Some(capability) => _ = more.insert(capability),
            None => unknown.push(name.clone()),
        }
    }
    bundle::warn_of_unknown(&unknown);
    let mut capabilities = capabilities.unwrap_or_default();
    let with =
        |set: &Option<Capabilities>| Some(set.iter().flatten().chain(&more).copied().collect());
    let (bounding, effective) = (with(capabilities.bounding()), with(capabilities.effective()));
    let (permitted, ambient) = (with(capabilities.permitted()), with(capabilities.ambient()));
    capabilities.set_bounding(bounding).set_effective(effective).set_permitted(permitted);
    if capabilities.inheritable().is_some() {
        capabilities.set_ambient(ambient);
    }
    capabilities
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::cli::args::{CommandLine, Verb};

    fn parsed(line: &str) -> Box<Exec> {
        let words = ["bulkhead", "exec"].into_iter().chain(line.split(' '));
        match CommandLine::try_parse_from(words).unwrap().verb {
            Verb::Exec(exec) => exec,
            other => panic!("{other:?}"),
        }
    }

    fn own() -> Process {
        serde_json::from_value(json!({
            "cwd": "/", "args": ["init"], "terminal": true, "env": ["PATH=/bin", "A=1"],
            "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
            "capabilities": {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"]}
        }))
        .unwrap()
    }

    #[test]
    fn options_change_the_containers_own_process() {
        let line =
            "-e A=2 -e B=3 -e A=4 -u 7:8 -g 9 --cwd /tmp --no-new-privs --cap CAP_CHOWN one ls -l";
        let process = changed(&parsed(line), Some(own())).unwrap();
        let json = serde_json::to_value(&process).unwrap();
        assert_eq!(json["args"], json!(["ls", "-l"]));
        assert_eq!(json["env"], json!(["PATH=/bin", "B=3", "A=4"]));
        assert_eq!(json["user"], json!({"uid": 7, "gid": 8, "additionalGids": [3, 9]}));
        assert_eq!((json["cwd"].clone(), json["terminal"].clone()), (json!("/tmp"), json!(false)));
        assert_eq!(json["noNewPrivileges"], json!(true));
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.bounding().as_ref().unwrap().len(), 2);
        assert_eq!(capabilities.ambient(), &None);
    }

    #[test]
    fn an_unknown_capability_is_left_out() {
        let process = changed(&parsed("--cap FLY --cap CAP_BPF one true"), Some(own())).unwrap();
        let sets = serde_json::to_value(process.capabilities()).unwrap();
        let permitted = ["CAP_KILL", "CAP_BPF"];
        assert!(
            permitted.iter().all(|name| sets["permitted"].to_string().contains(name)),
            "{sets}"
        );
        assert_eq!(sets["permitted"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn without_options_only_the_program_changes() {
        let process = changed(&parsed("one true"), Some(own())).unwrap();
        let mut expected = own();
        expected.set_args(Some(vec!["true".to_owned()])).set_terminal(Some(false));
        assert_eq!(process, expected);
    }

    #[test]
    fn what_is_no_number_is_named() {
        for (line, words) in [
            ("-u root one true", "--user \"root\": uid \"root\" is not a number"),
            ("-u 1:staff one true", "--user \"1:staff\": gid \"staff\" is not a number"),
        ] {
            let error = changed(&parsed(line), Some(own())).unwrap_err();
            assert_eq!(error.to_string(), words);
        }
    }

    #[test]
    fn names_differ() {
        assert_ne!(name().unwrap(), name().unwrap());
    }
}
