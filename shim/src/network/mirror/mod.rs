//! Mirrors a container's network namespace on the host into its guest.
//!
//! The guest gets one interface for each that somebody has put into the namespace. Beside each of
//! these is a tap: all frames that arrive at the interface are redirected to the tap, and the other
//! way round. The interface's name, addresses, routes and neighbours are copied into the guest.
//! They also stay on the host, where no frame reaches them any more. [`Mirror::update`] reads the
//! namespace again to find what was added, changed or removed later.

mod answers;
mod observe;
mod redirect;
mod tap;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_netlink::{Changes, Connection};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use thiserror::Error;

pub use self::observe::Interface;
use self::observe::Unusable;

/// How often [`restore_here`] looks.
const STEP: Duration = Duration::from_millis(20);
/// The most interfaces that a machine has slots for.
pub const INTERFACES_MAX: u8 = 3;

/// Why a network cannot be brought into the guest.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// The namespace.
    #[error("cannot use network namespace {}; name an existing one", .0.display())]
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
    /// Another pod has its frames.
    #[error(
        "the frames of interface {0} go to {1}, a tap of another pod of Bulkhead, which has another \
         --root; give this container a network namespace of its own"
    )]
    Owned(String, String),
    /// A step that the kernel refused.
    #[error("{what} of the container's network")]
    Step {
        /// The step, as a noun.
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

/// What has changed since the last time.
#[derive(Debug, Default)]
pub struct Update {
    /// Places whose interface is gone.
    pub gone: Vec<u8>,
    /// Places that have a new interface, each with the queues of its tap.
    pub new: Vec<(u8, Vec<OwnedFd>)>,
    /// Places whose cable was plugged or unplugged. The cable of a new interface is plugged if it
    /// is not listed here.
    pub cables: Vec<(u8, bool)>,
    /// What the guest is to have.
    pub view: View,
    /// Interfaces that the guest cannot have, each reported once.
    pub refused: Vec<MirrorError>,
}

/// What the guest is to have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Interfaces by their places, which are below [`INTERFACES_MAX`].
    pub interfaces: Vec<(u8, Interface)>,
    /// Addresses, routes, neighbours and rules, as rtnetlink(7) has them, in the order in which they
    /// can be set.
    pub settings: Vec<Vec<u8>>,
    /// The loopback has IPv6.
    pub ipv6: bool,
}

/// Interfaces of the host that are joined with taps. Dropping this separates them again.
#[derive(Debug)]
pub struct Mirror {
    namespace: File,
    /// The number of queues of each tap.
    queues: usize,
    connection: Connection,
    joined: Vec<Joined>,
    /// Numbers of all taps that were made here and are not gone yet.
    taps: Vec<u32>,
    /// Numbers of interfaces that cannot be mirrored.
    refused: Vec<u32>,
    /// Whether the namespace gets copies of answers.
    answers: bool,
    /// What was found the last time.
    view: View,
}

/// An interface whose frames go to a tap.
#[derive(Debug)]
struct Joined {
    place: u8,
    interface: Interface,
    /// The tap's number.
    tap: u32,
}

impl Mirror {
    /// Opens a namespace, of which nothing is joined yet, and a socket that reports its changes.
    /// Each tap will have so many queues.
    ///
    /// # Errors
    /// When it cannot be entered.
    pub fn open(path: &Path, queues: usize) -> Result<(Self, Changes), MirrorError> {
        let bad = |error| MirrorError::Namespace(path.to_owned(), error);
        let namespace = File::open(path).map_err(bad)?;
        let opened = within(&namespace, || Ok((Connection::open()?, Changes::open()?)));
        let (connection, changes) = opened.map_err(bad)?;
        // The guest's loopback has IPv6 from the beginning.
        let (joined, view) = (Vec::new(), View { ipv6: true, ..View::default() });
        let (taps, refused) = (Vec::new(), Vec::new());
        let answers = false;
        let mirror = Self { namespace, queues, connection, joined, taps, refused, answers, view };
        Ok((mirror, changes))
    }

    /// Reads the whole namespace, and joins each new interface with a tap of its own. Returns
    /// `None` if nothing has changed.
    ///
    /// # Errors
    /// When the kernel does not list it.
    pub fn update(&mut self) -> Result<Option<Update>, MirrorError> {
        let unknown = |what| move |source| MirrorError::Step { what, source };
        let mut found = observe::interfaces(&mut self.connection).map_err(unknown("interfaces"))?;
        let mut update = Update { gone: self.forget_all_but(&found), ..Update::default() };
        found.retain(|(index, _)| !self.taps.contains(index));
        let count = found.len();
        for (index, interface) in found {
            let taken = interface.map_err(MirrorError::from);
            match taken.and_then(|interface| self.take(interface, count, &mut update)) {
                Ok(()) => {}
                Err(_) if self.refused.contains(&index) => {}
                Err(error) => {
                    self.refused.push(index);
                    update.refused.push(error);
                }
            }
        }
        let joined = &self.joined;
        let known = |index| {
            let joined = joined.iter().find(|joined| joined.interface.index == index);
            joined.map(|joined| observe::Up(joined.interface.up))
        };
        let settings = observe::settings(&mut self.connection, known)
            .map_err(unknown("addresses and routes"))?;
        let interfaces = joined.iter().map(|it| (it.place, it.interface.clone())).collect();
        let ipv6 =
            observe::loopback_has_ipv6(&mut self.connection).map_err(unknown("the loopback"))?;
        let view = View { interfaces, settings, ipv6 };
        let same = view == self.view && update.refused.is_empty();
        self.view.clone_from(&view);
        Ok((!same).then_some(Update { view, ..update }))
    }

    /// From now on, gives processes of the namespace copies of the answers that they wait for, by
    /// new interfaces too.
    ///
    /// # Errors
    /// When the kernel cannot filter these answers.
    pub fn share_answers(&mut self) -> Result<(), MirrorError> {
        if self.answers {
            return Ok(());
        }
        self.answers = true;
        for joined in &self.joined {
            answers::share(&mut self.connection, joined.interface.index, joined.tap)
                .map_err(failed(&joined.interface.name, answers::UNSHARED))?;
        }
        Ok(())
    }

    /// Forgets what does not exist any more; returns the places that are free now.
    fn forget_all_but(&mut self, found: &[(u32, Result<Interface, Unusable>)]) -> Vec<u8> {
        let is_there = |index: &u32| found.iter().any(|(there, _)| there == index);
        self.refused.retain(is_there);
        self.taps.retain(is_there);
        let gone = self.joined.extract_if(.., |joined| !is_there(&joined.interface.index));
        gone.map(|joined| joined.place).collect()
    }

    /// Joins an interface with a tap, or takes over the changes of one that is joined already.
    fn take(
        &mut self,
        interface: Interface,
        count: usize,
        update: &mut Update,
    ) -> Result<(), MirrorError> {
        let known = self.joined.iter_mut().find(|it| it.interface.index == interface.index);
        let Some(known) = known else {
            let carrier = interface.carrier;
            let (place, queues) = self.join(interface, count)?;
            update.new.push((place, queues));
            update.cables.extend((!carrier).then_some((place, false)));
            return Ok(());
        };
        if known.interface.mtu != interface.mtu {
            redirect::fit(&mut self.connection, known.tap, interface.mtu)
                .map_err(failed(&interface.name, "cannot set up its tap"))?;
        }
        if known.interface.carrier != interface.carrier {
            update.cables.push((known.place, interface.carrier));
        }
        known.interface = interface;
        Ok(())
    }

    fn join(
        &mut self,
        interface: Interface,
        count: usize,
    ) -> Result<(u8, Vec<OwnedFd>), MirrorError> {
        let taken = |place: &u8| self.joined.iter().any(|joined| joined.place == *place);
        let place = (0..INTERFACES_MAX).find(|place| !taken(place));
        let place = place.ok_or(MirrorError::TooMany(count))?;
        let failed = |what| failed(&interface.name, what);
        let open = || tap::open(self.queues);
        let (queues, number) = within(&self.namespace, open).map_err(failed("no tap for it"))?;
        self.taps.push(number);
        let connection = &mut self.connection;
        redirect::fit(connection, number, interface.mtu)
            .map_err(failed("cannot set up its tap"))?;
        if let Err(error) = redirect::take(connection, interface.index) {
            let what =
                "another program has an ingress qdisc on it; remove that first (tc qdisc show)";
            return Err(match observe::tap_of(connection, interface.index) {
                Ok(Some(tap)) => MirrorError::Owned(interface.name, tap),
                _ => failed(what)(error),
            });
        }
        let redirected = redirect::keep_queue(connection, &interface)
            .and_then(|()| redirect::take(connection, number))
            .and_then(|()| redirect::join(connection, interface.index, number));
        let shared = self.answers.then(|| answers::share(connection, interface.index, number));
        if let Err(error) = redirected {
            part(connection, interface.index);
            return Err(failed("cannot redirect its frames")(error));
        }
        if let Some(Err(error)) = shared {
            tracing::warn!(interface = %interface.name, error = %error, "{}", answers::UNSHARED);
        }
        self.joined.push(Joined { place, interface, tap: number });
        Ok((place, queues))
    }
}

fn failed(interface: &str, what: &'static str) -> impl Fn(io::Error) -> MirrorError + use<> {
    let interface = interface.to_owned();
    move |source| MirrorError::Link { interface: interface.clone(), what, source }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        for joined in &self.joined {
            part(&mut self.connection, joined.interface.index);
        }
    }
}

fn part(connection: &mut Connection, index: u32) {
    if let Err(error) = redirect::part(connection, index) {
        // The interface may be gone already.
        tracing::debug!(index, error = %error, "cannot give an interface its frames back");
    }
}

/// Removes redirections to taps that are gone: a supervisor that was killed leaves them.
///
/// # Errors
/// When the namespace cannot be read; one that is gone is no error.
pub fn restore(namespace: &Path) -> io::Result<()> {
    let namespace = match File::open(namespace) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    let mut connection = within(&namespace, Connection::open)?;
    for link in observe::links(&mut connection)? {
        if redirect::leads_nowhere(&mut connection, link.header.index)? {
            redirect::part(&mut connection, link.header.index)?;
        }
    }
    Ok(())
}

/// Removes redirections of the calling thread's network namespace as soon as their taps are gone. A
/// supervisor that was killed leaves them, and its monitor, which has the taps, then ends by
/// itself. Redirections whose taps still exist when the time is up stay.
///
/// # Errors
/// When the kernel does not list the interfaces.
pub fn restore_here(patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    let mut connection = Connection::open()?;
    loop {
        let mut waits = false;
        for link in observe::links(&mut connection)? {
            let index = link.header.index;
            if redirect::leads_nowhere(&mut connection, index)? {
                part(&mut connection, index);
            } else {
                waits |= observe::tap_of(&mut connection, index)?.is_some();
            }
        }
        if !waits || Instant::now() > deadline {
            return Ok(());
        }
        thread::sleep(STEP);
    }
}

/// Opens something in a network namespace, on a thread of its own.
pub(crate) fn within<T: Send>(
    namespace: &File,
    open: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let inside = || -> io::Result<T> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        open()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("network".to_owned());
        let ended = thread.spawn_scoped(scope, inside)?.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("thread failed")))
    })
}
