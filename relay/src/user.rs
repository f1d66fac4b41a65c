//! As whom a connection is made: servers decide by the user that the kernel names.

use std::io;
use std::thread;

use rustix::net::UCred;
use rustix::process::{Gid, Uid, getpid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::sync::oneshot;

/// The stack of a thread that makes one system call.
const STACK: usize = 128 << 10;

/// A user, as this kernel numbers them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// Its number; not the highest, which setresuid(2) takes for "no change".
    pub uid: u32,
    /// Its group, as well.
    pub gid: u32,
    /// Its supplementary groups.
    pub groups: Vec<u32>,
}

impl User {
    /// What a server is to see of a sender. Root may name any user, but no other process.
    #[must_use]
    pub fn credentials(&self) -> UCred {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        UCred { pid: getpid(), uid, gid }
    }

    /// Does something as this user, in a thread of its own: the kernel has an identity for each
    /// thread.
    ///
    /// # Errors
    /// No thread can be started or take the identity, or the work fails.
    pub async fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let (tell, done) = oneshot::channel();
        let as_user = move || {
            // Nobody waits for the result if the connection was given up.
            let _ = tell.send(self.become_it().and_then(|()| work()));
        };
        thread::Builder::new().name("connect".into()).stack_size(STACK).spawn(as_user)?;
        done.await.map_err(|_| io::Error::other("a thread of this process failed"))?
    }

    /// Gives the calling thread this identity, and with it no capabilities unless it is root. It is
    /// the effective one only, which the kernel and servers look at: by the real one, other processes
    /// of the user could send signals to this one.
    fn become_it(&self) -> io::Result<()> {
        if self.uid == u32::MAX || self.gid == u32::MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let groups: Vec<_> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        set_thread_groups(&groups)?;
        set_thread_res_gid(None, gid, None)?;
        Ok(set_thread_res_uid(None, uid, None)?)
    }
}
