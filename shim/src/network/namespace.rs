//! The network namespace of a container as the host sees it: the one that its stand-in is in.
//!
//! Callers find this namespace by the stand-in's pid, in hooks or later, and put interfaces into
//! it. The machine itself has a network of its own.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, unshare};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

/// Which network namespace a stand-in is in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// A new one.
    New,
    /// One that exists.
    Join(PathBuf),
}

impl Network {
    /// Moves the calling thread there; threads that it starts later are there too.
    ///
    /// # Errors
    /// When it does not exist, or the kernel has no memory for a new one.
    pub fn enter(&self) -> io::Result<()> {
        match self {
            Self::New => Ok(unshare(CloneFlags::CLONE_NEWNET)?),
            Self::Join(path) => {
                let namespace = File::open(path)?;
                Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
            }
        }
    }
}
