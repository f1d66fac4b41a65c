//! Connects a process of the guest with its stand-in on the host: streams, signals, and the exit
//! status.

use std::convert::Infallible;
use std::future::pending;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::StreamHeader;
use bulkhead_protocol::agent::descriptor::Kind as Asked;
use bulkhead_protocol::agent::{Descriptor, SharedFile, Streams, Terminal, WaitReply};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::bundle;
use crate::machine::agent::Target;
use crate::state::Exit;
use crate::state::timestamp;
use crate::streams::attach::{Said, StandIn, TerminalSize, Wants, Written};
use crate::streams::preserved::DescriptorKind;
use crate::supervisor::pod::{Lent, Pod, PodError};

/// The exit status of a process whose machine has ended: as after SIGKILL.
const KILLED: u8 = 137;
/// How long the guest may take to end a killed process if its container is alone in the machine;
/// less than Docker waits.
const KILL_PATIENCE: Duration = Duration::from_secs(7);
/// The same if other containers are in the machine, which would end with it.
const SHARED_KILL_PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait for the end of the machine after a call to its agent has failed.
const EXPLANATION: Duration = Duration::from_secs(1);

/// The two sides of a process's streams: for the agent and for its stand-in.
#[derive(Debug)]
pub(crate) struct Ends<'a> {
    /// The standard streams, for the agent.
    pub(crate) streams: Streams,
    /// The descriptors beside them, for the agent.
    pub(crate) descriptors: Vec<Descriptor>,
    /// The host's ends of all streams, for the stand-in.
    pub(crate) sockets: Vec<UnixStream>,
    /// The files among the descriptors. They are shared until the agent has opened them.
    pub(crate) lent: Option<Lent<'a>>,
}

/// Opens the streams and descriptors that a stand-in has for its process.
///
/// # Errors
/// When the agent does not accept a stream, or a file cannot be shared.
pub(crate) async fn open<'a>(pod: &'a Pod, stand_in: &StandIn) -> Result<Ends<'a>, PodError> {
    let (streams, mut sockets) = open_streams(pod, stand_in.wants).await?;
    let mut shared = stand_in.descriptors.iter().filter_map(|descriptor| match descriptor.kind {
        DescriptorKind::File { .. } => Some(bundle::FileKind::File),
        DescriptorKind::Directory { .. } => Some(bundle::FileKind::Directory),
        _ => None,
    });
    let mounts = stand_in.take_mounts().await;
    let mounts: Vec<_> = shared.by_ref().zip(mounts).collect();
    let lent = if mounts.is_empty() { None } else { Some(pod.lend(mounts).await?) };
    let directory = lent.as_ref().map(Lent::directory).unwrap_or_default();
    let mut descriptors = Vec::with_capacity(stand_in.descriptors.len());
    let mut files = 0..;
    let mut file = |offset| {
        let name = files.next().unwrap_or(0_usize).to_string();
        Asked::File(SharedFile { path: directory.join(name).display().to_string(), offset })
    };
    for descriptor in &stand_in.descriptors {
        let stream =
            if descriptor.kind.is_stream() { Some(pod.open_stream().await?) } else { None };
        let (header, socket) = stream.map(|(header, socket)| (header.0.to_vec(), socket)).unzip();
        sockets.extend(socket);
        let header = header.unwrap_or_default();
        let kind = match &descriptor.kind {
            DescriptorKind::Reading => Asked::Reading(header),
            DescriptorKind::Writing => Asked::Writing(header),
            DescriptorKind::Socket => Asked::Socket(header),
            DescriptorKind::File { offset, .. } => file(*offset),
            DescriptorKind::Directory { .. } => file(0),
            DescriptorKind::Device(path) => Asked::Device(path.clone()),
        };
        descriptors.push(Descriptor { kind: Some(kind), flags: descriptor.flags });
    }
    Ok(Ends { streams, descriptors, sockets, lent })
}

/// Opens the standard streams that the stand-in wants; returns their headers for the agent and the
/// sockets for the stand-in.
///
/// # Errors
/// When the agent does not accept one.
async fn open_streams(pod: &Pod, wants: Wants) -> Result<(Streams, Vec<UnixStream>), PodError> {
    if let Some(TerminalSize { rows, columns }) = wants.terminal {
        let (header, socket) = pod.open_stream().await?;
        let stream = header.0.to_vec();
        let (rows, columns) = (rows.into(), columns.into());
        let terminal = Terminal { stream, rows, columns, plain: wants.plain };
        return Ok((Streams { terminal: Some(terminal), ..Streams::default() }, vec![socket]));
    }
    let open = async |wanted: bool| -> Result<_, PodError> {
        if wanted { Ok(Some(pod.open_stream().await?)) } else { Ok(None) }
    };
    let (stdin, stdout, stderr) =
        tokio::try_join!(open(wants.stdin), open(wants.stdout), open(wants.stderr))?;
    let header = |stream: &Option<(StreamHeader, _)>| {
        stream.as_ref().map_or_else(Vec::new, |(header, _)| header.0.to_vec())
    };
    let streams = Streams {
        stdin: header(&stdin),
        stdout: header(&stdout),
        stderr: header(&stderr),
        terminal: None,
    };
    let sockets = [stdin, stdout, stderr].into_iter().flatten().map(|(_, socket)| socket);
    Ok((streams, sockets.collect()))
}

/// How a process ended.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) exit: Exit,
    /// Why, if it did not end by itself.
    pub(crate) reason: Option<String>,
    /// How many bytes it wrote to its streams, if its machine still runs.
    pub(crate) written: Option<Written>,
    /// The guest did not end the process in time after it was killed.
    pub(crate) immortal: bool,
}

impl End {
    fn of(reply: &WaitReply) -> Self {
        let status = u8::try_from(reply.exit_status).unwrap_or(u8::MAX);
        let exit = Exit { status, at_ns: reply.exited_at_ns, oom_killed: reply.oom_killed };
        let written = Written { stdout: reply.stdout_bytes, stderr: reply.stderr_bytes };
        Self { exit, reason: None, written: Some(written), immortal: false }
    }

    fn without_the_machine(reason: String) -> Self {
        Self { exit: killed(), reason: Some(reason), written: None, immortal: false }
    }
}

/// Returns how long the guest may take to end a killed process.
pub(crate) const fn patience(alone: bool) -> Duration {
    if alone { KILL_PATIENCE } else { SHARED_KILL_PATIENCE }
}

/// Forwards signals until the process ends. If the stand-in disappears, the process is killed; if
/// it is the init process, all processes of the container are. Once `doomed` is true, this waits no
/// longer than `patience`.
pub(crate) async fn until_end(
    pod: &Pod,
    target: Target<'_>,
    stand_in: &StandIn,
    (doomed, patience): (&watch::Sender<bool>, impl Future<Output = Duration>),
) -> End {
    let mut killed = doomed.subscribe();
    let outlives_its_kill = async {
        // The sender lives as long as the container.
        let _ = killed.wait_for(|killed| *killed).await;
        sleep(patience.await).await;
    };
    tokio::select! {
        answer = pod.agent.wait(target) => match answer {
            Ok(reply) => End::of(&reply),
            Err(error) => {
                // The reason for the end of the machine explains more than a broken connection.
                let words = timeout(EXPLANATION, pod.broken()).await;
                End::without_the_machine(words.unwrap_or_else(|_| error.to_string()))
            }
        },
        words = pod.broken() => End::without_the_machine(words),
        () = outlives_its_kill => {
            let reason = "the guest did not end the process in time after it was killed";
            let end = End::without_the_machine(reason.to_owned());
            End { immortal: true, ..end }
        }
        never = pass_on(pod, target, stand_in, doomed) => match never {},
    }
}

/// Forwards signals and terminal sizes from the stand-in. If the stand-in disappears, its process
/// is killed.
async fn pass_on(
    pod: &Pod,
    target: Target<'_>,
    stand_in: &StandIn,
    doomed: &watch::Sender<bool>,
) -> Infallible {
    loop {
        let said = stand_in.said().await;
        let passed = match said {
            Some(Said::Signal(signal)) => pod.agent.kill(target, signal, false).await,
            Some(Said::Resize(size)) => pod.agent.resize(target, size).await,
            None => {
                doomed.send_replace(true);
                pod.agent.kill(target, 9, target.exec.is_empty()).await
            }
        };
        if let Err(error) = passed {
            tracing::debug!(?said, error = %error, "not passed on");
        }
        if said.is_none() {
            return pending().await;
        }
    }
}

/// Returns the exit of a process whose machine has just ended.
pub(crate) fn killed() -> Exit {
    Exit { status: KILLED, at_ns: timestamp::now_ns(), oom_killed: false }
}
