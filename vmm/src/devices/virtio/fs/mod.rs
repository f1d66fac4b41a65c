//! The file system device, VIRTIO 1.2 §5.11: a relay to the pod's file server.
//!
//! The device knows nothing of files. It passes FUSE messages between its queues and a SEQPACKET
//! socket ([`relay`]), and checks their headers on the way. Many requests are in flight at once, as
//! many as the queues hold. DAX and the notification queue are not offered.

use std::io;
use std::os::fd::OwnedFd;

use vmm_sys_util::epoll::EventSet;

use super::worker::Sources;
use super::{ConfigSpace, Context, Device, Identity, Ready, Serve, ServeError};
use relay::{Answer, Forwarded, Received, Relay};

mod relay;

/// The device type, §5.11.1.
const DEVICE_ID: u32 = 26;
/// High priority (FORGET and INTERRUPT), then requests, §5.11.2.
const QUEUE_SIZES: &[u16] = &[64, 256];
/// Bytes of the tag in the configuration space, §5.11.4.
const TAG_BYTES: usize = 36;
/// The file server's socket, among the descriptors that the worker watches.
const SERVER: u32 = 0;
/// Requests taken, or packets received, before the worker looks at anything else.
const BATCH: usize = 128;

/// Makes a device that the guest mounts by `tag`, at most 36 bytes, and that `server` answers.
pub(crate) fn device(tag: &str, server: OwnedFd) -> Device<Fs> {
    let mut config = tag.as_bytes().to_vec();
    config.resize(TAG_BYTES, 0);
    // One request queue.
    config.extend(1_u32.to_le_bytes());
    let identity = Identity { device_id: DEVICE_ID, features: 0, queue_sizes: QUEUE_SIZES };
    Device::new(identity, ConfigSpace::read_only(config), Fs::new(server))
}

/// The logic of the device.
#[derive(Debug)]
pub(crate) struct Fs {
    relay: Relay,
    /// The socket is full; the queues wait until it is writable.
    full: bool,
}

impl Fs {
    fn new(server: OwnedFd) -> Self {
        Self { relay: Relay::new(server), full: false }
    }

    /// Takes what the driver made available in one queue.
    fn take(&mut self, index: usize, context: &mut Context<'_>) -> Result<(), ServeError> {
        let memory = context.memory;
        let Some(queue) = context.queues.get_mut(index) else { return Ok(()) };
        let (mut taken, mut done) = (0, false);
        while !self.full {
            if taken == BATCH {
                queue.kick_again()?;
                break;
            }
            let Some(chain) = queue.pop_or_arm(memory)? else { break };
            taken += 1;
            let head = chain.head;
            match self.relay.forward(memory, chain, index)? {
                Forwarded::Kept => {}
                Forwarded::Done(written) => {
                    queue.complete(memory, head, written)?;
                    done = true;
                }
                Forwarded::Full => {
                    queue.unpop();
                    self.wait_for_room(context.sources)?;
                }
            }
        }
        if done {
            queue.signal(memory)?;
        }
        Ok(())
    }

    /// Sends nothing until the socket is writable.
    fn wait_for_room(&mut self, sources: &Sources) -> io::Result<()> {
        self.full = true;
        sources.modify(self.relay.server(), SERVER, EventSet::IN | EventSet::OUT)
    }

    /// Sends held-back requests, then those that a full socket left in the queues.
    fn send_on(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        let was_full = std::mem::take(&mut self.full);
        if !self.relay.is_gone() {
            if was_full {
                context.sources.modify(self.relay.server(), SERVER, EventSet::IN)?;
            }
            let (done, full) = self.relay.resume(context.memory)?;
            complete(&done, context)?;
            if full {
                self.wait_for_room(context.sources)?;
            }
        }
        let queues = if was_full { context.queues.len() } else { 0 };
        (0..queues).try_for_each(|index| self.take(index, context))
    }

    /// Completes the requests that the file server has answered.
    fn give_back(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        let mut answers = Vec::new();
        for _ in 0..BATCH {
            match self.relay.receive(context.memory)? {
                Received::Nothing => break,
                Received::Dropped => {}
                Received::Reply(answer) => answers.push(answer),
            }
        }
        complete(&answers, context)
    }

    /// Fails the requests that a file server has not answered before it ended.
    fn give_up(&mut self, context: &mut Context<'_>) -> Result<(), ServeError> {
        // epoll would report the closed socket again and again.
        context.sources.remove(self.relay.server())?;
        complete(&self.relay.fail_all(context.memory)?, context)
    }
}

/// Completes chains, and interrupts the driver once for each queue.
fn complete(answers: &[Answer], context: &mut Context<'_>) -> Result<(), ServeError> {
    let memory = context.memory;
    for (index, queue) in context.queues.iter_mut().enumerate() {
        let mut done = false;
        for answer in answers.iter().filter(|answer| answer.queue == index) {
            queue.complete(memory, answer.head, answer.written)?;
            done = true;
        }
        if done {
            queue.signal(memory)?;
        }
    }
    Ok(())
}

impl Serve for Fs {
    const NAME: &'static str = "fs";
    const SYSCALLS: &'static [i64] = &[
        libc::SYS_sendmsg,  // requests to the file server
        libc::SYS_recvfrom, // the header of a reply
        libc::SYS_recvmsg,  // a whole reply
    ];

    fn start(&mut self, _features: u64, sources: &Sources) -> io::Result<()> {
        if self.relay.is_gone() {
            return Ok(());
        }
        sources.add(self.relay.server(), SERVER, EventSet::IN)
    }

    fn serve(&mut self, ready: Ready, context: &mut Context<'_>) -> Result<(), ServeError> {
        match ready {
            Ready::Queue(index) => self.take(index, context)?,
            Ready::Source(_) => {
                self.give_back(context)?;
                self.send_on(context)?;
            }
        }
        // Sending, as well as receiving, may have found that the file server has ended.
        if self.relay.has_ended() { self.give_up(context) } else { Ok(()) }
    }

    fn stop(&mut self, _sources: &Sources) {
        self.relay.forget_all();
        self.full = false;
    }
}

#[cfg(test)]
mod tests;
