//! A container's network namespace on the host, as its guest has it.
//!
//! For each interface that somebody has put there the guest gets one: a tap beside it, to which all
//! that arrives at the interface is redirected, and the other way round. What the interface is called,
//! its addresses, routes and neighbours are copied into the guest; on the host they stay,
//! where nothing reaches them any more.

mod observe;
mod redirect;
mod tap;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use bulkhead_netlink::Connection;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thiserror::Error;

pub use self::observe::Interface;
use self::observe::Unusable;

/// The most interfaces that a machine has slots for.
pub const INTERFACES_MAX: usize = 3;

/// Why a network cannot be brought into the guest.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// The namespace.
    #[error("network namespace {} cannot be used; name an existing one", .0.display())]
    Namespace(PathBuf, #[source] io::Error),
    /// An interface that is not Ethernet.
    #[error(transparent)]
    Interface(#[from] Unusable),
    /// Too many.
    #[error(
        "the network namespace has {0} interfaces, and a machine has room for {INTERFACES_MAX}; \
         take some out"
    )]
    TooMany(usize),
    /// What the kernel did not do.
    #[error("{what} of the container's network")]
    Step {
        /// Said as a noun.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// One interface.
    #[error("interface {interface}: {what}")]
    Link {
        /// Its name.
        interface: String,
        /// What could not be done to it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// What the guest is to have.
#[derive(Debug)]
pub struct Copy {
    /// Each with the tap that is its other end.
    pub interfaces: Vec<(Interface, OwnedFd)>,
    /// Addresses, routes and neighbours, as rtnetlink(7) has them, in the order in which they can be
    /// set.
    pub settings: Vec<Vec<u8>>,
}

/// Interfaces of the host that are joined with taps. Dropped, they are as they were.
#[derive(Debug)]
pub struct Mirror {
    namespace: File,
    joined: Vec<u32>,
}

impl Mirror {
    /// Joins each interface of a namespace with a tap of its own; nothing if it has none.
    ///
    /// # Errors
    /// Names the interface that cannot be had; all are as they were then.
    pub fn new(path: &Path) -> Result<Option<(Self, Copy)>, MirrorError> {
        let bad = |error| MirrorError::Namespace(path.to_owned(), error);
        let namespace = File::open(path).map_err(bad)?;
        // Knows those that were joined before another failed too.
        let mut mirror = Self { namespace, joined: Vec::new() };
        let Self { namespace, joined } = &mut mirror;
        let copied = within(namespace, |connection| join_all(connection, joined)).map_err(bad)?;
        Ok(copied?.map(|copied| (mirror, copied)))
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if self.joined.is_empty() {
            return;
        }
        let parted = within(&self.namespace, |connection| {
            for index in &self.joined {
                if let Err(error) = redirect::part(connection, *index) {
                    // It may be gone with whoever made it.
                    tracing::debug!(index, error = %error, "interface was not parted");
                }
            }
        });
        if let Err(error) = parted {
            tracing::warn!(error = %error, "the container's interfaces were left redirected");
        }
    }
}

/// Takes redirections away that lead nowhere any more: those of a supervisor that was killed.
///
/// # Errors
/// When the namespace cannot be looked at; one that is gone is no error.
pub fn restore(namespace: &Path) -> io::Result<()> {
    let namespace = match File::open(namespace) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    within(&namespace, |connection| {
        for link in observe::links(connection)? {
            if redirect::leads_nowhere(connection, link.header.index)? {
                redirect::part(connection, link.header.index)?;
            }
        }
        Ok(())
    })?
}

fn join_all(
    connection: &mut Connection,
    joined: &mut Vec<u32>,
) -> Result<Option<Copy>, MirrorError> {
    let found = observe::interfaces(connection)?;
    match found.len() {
        0 => return Ok(None),
        count if count > INTERFACES_MAX => return Err(MirrorError::TooMany(count)),
        _ => {}
    }
    let settings = observe::settings(connection, &found)
        .map_err(|source| MirrorError::Step { what: "addresses and routes", source })?;
    let mut interfaces = Vec::with_capacity(found.len());
    for interface in found {
        let failed = |what| {
            let interface = interface.name.clone();
            move |source| MirrorError::Link { interface, what, source }
        };
        let (tap, name) = tap::open().map_err(failed("no tap for it"))?;
        let index = redirect::prepare(connection, &name, &interface)
            .map_err(failed("its tap cannot be set up"))?;
        redirect::take(connection, interface.index)
            .map_err(failed("somebody else may redirect its frames; let nobody (tc qdisc show)"))?;
        // From here on it is given back, whatever fails.
        joined.push(interface.index);
        redirect::take(connection, index)
            .and_then(|()| redirect::join(connection, interface.index, index))
            .map_err(failed("its frames cannot be redirected"))?;
        interfaces.push((interface, tap));
    }
    Ok(Some(Copy { interfaces, settings }))
}

/// Does something in a network namespace, on a thread of its own.
fn within<T: Send>(
    namespace: &File,
    work: impl FnOnce(&mut Connection) -> T + Send,
) -> io::Result<T> {
    let inside = || -> io::Result<T> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(work(&mut Connection::open()?))
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("network".to_owned());
        let ended = thread.spawn_scoped(scope, inside)?.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("thread failed")))
    })
}
