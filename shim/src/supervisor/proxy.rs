//! One process of the guest and its stand-in on the host, tied together: streams, signals, the end.

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

/// The status of a process whose machine ended under it: as if killed.
const KILLED: u8 = 137;
/// How long the guest may take to end a process that was killed, if nobody else is in its machine: less
/// than Docker waits for.
const KILL_PATIENCE: Duration = Duration::from_secs(7);
/// How long, if ending the machine would end others.
const SHARED_KILL_PATIENCE: Duration = Duration::from_secs(20);
/// How long the machine's end may take to be known once its agent does not answer.
const EXPLANATION: Duration = Duration::from_secs(1);

/// What a process is made with, and its stand-in gets.
#[derive(Debug)]
pub(crate) struct Ends<'a> {
    /// The standard streams, for the agent.
    pub(crate) streams: Streams,
    /// What is beyond them, for the agent.
    pub(crate) descriptors: Vec<Descriptor>,
    /// The host's ends of all that are streams, for the stand-in.
    pub(crate) sockets: Vec<UnixStream>,
    /// The files among the descriptors, which the agent opens; then they need not be there any more.
    pub(crate) lent: Option<Lent<'a>>,
}

/// Opens what a stand-in has for its process.
///
/// # Errors
/// When the agent does not accept a stream, or a file cannot be shown to it.
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

/// Opens the streams that are wanted: their names for the agent, and the sockets for the stand-in.
///
/// # Errors
/// When the agent does not accept one.
async fn open_streams(pod: &Pod, wants: Wants) -> Result<(Streams, Vec<UnixStream>), PodError> {
    if let Some(TerminalSize { rows, columns }) = wants.terminal {
        let (header, socket) = pod.open_stream().await?;
        let stream = header.0.to_vec();
        let terminal = Terminal { stream, rows: rows.into(), columns: columns.into() };
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
    /// What its streams carry of it, if its machine lives on.
    pub(crate) written: Option<Written>,
    /// It was killed, and the guest did not end it in time.
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

/// How long the guest may take to end a process that was killed.
pub(crate) const fn patience(alone: bool) -> Duration {
    if alone { KILL_PATIENCE } else { SHARED_KILL_PATIENCE }
}

/// Passes signals on until the process ends, whichever way. A process that nobody stands for any more is
/// killed: if it is the init process, with all others of the container. One that was killed, by whoever
/// says so in `doomed`, ends within `patience`, whatever it waits for.
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
                // The machine's own end explains more than the broken connection.
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

/// Passes on what the stand-in says; one that goes away dooms its process.
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

/// The end, now, of a process whose machine is gone.
pub(crate) fn killed() -> Exit {
    Exit { status: KILLED, at_ns: timestamp::now_ns(), oom_killed: false }
}
