//! Configures the guest's interfaces like the host's: names, addresses, routes, neighbours.
//!
//! The host sends the rtnetlink(7) messages of its own kernel. They are sent to this kernel with
//! the numbers that the interfaces have in the guest. The host sends all of them each time that one
//! has changed. What it no longer names is removed; what the guest has set itself stays.

use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_netlink::route::RouteNetlinkMessage;
use bulkhead_netlink::route::address::AddressAttribute;
use bulkhead_netlink::route::link::LinkAttribute;
use bulkhead_netlink::route::route::RouteAttribute;
use bulkhead_netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, decode};
use bulkhead_protocol::agent::Interface;

use crate::hotplug::PLATFORM_BUS;

const LOOPBACK: &str = "lo";
/// The loopback's number in every network namespace.
const LOOPBACK_NUMBER: u32 = 1;
/// The switch that turns IPv6 off.
const IPV6_OFF: &str = "disable_ipv6";
/// The switch of duplicate address detection.
const DETECTION: &str = "accept_dad";
/// The kernel's list of IPv6 addresses.
const ADDRESSES: &str = "/proc/net/if_inet6";
/// How long addresses may take that need no detection.
const SETTLING: Duration = Duration::from_millis(500);
/// How the kernel makes an interface's link-local address: from the MAC address, "0", or not at
/// all, "1".
const GENERATION: &str = "addr_gen_mode";

/// Why the network could not be configured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("network of the guest")]
    Open(#[source] io::Error),
    #[error("interface {0} of the host is in slot {1}, where no interface is")]
    Missing(String, u32),
    #[error("cannot set up interface {0}")]
    Interface(String, #[source] io::Error),
    #[error("cannot set {0}")]
    Setting(String, #[source] io::Error),
}

/// The configuration that the host has sent.
#[derive(Debug, Default)]
pub(crate) struct Network {
    /// Each with its number in the guest.
    interfaces: Vec<(Interface, u32)>,
    /// Messages with the guest's interface numbers.
    settings: Vec<RouteNetlinkMessage>,
    /// `None` until the host has sent it.
    loopback_ipv6: Option<bool>,
}

impl Network {
    /// Configures interfaces that were bound like those of the host, sets `settings` in their
    /// order, and removes those that were set before and are not among them.
    ///
    /// # Errors
    /// The first that occurred; all that can be done is done.
    pub(crate) fn configure(
        &mut self,
        interfaces: Vec<Interface>,
        settings: &[Vec<u8>],
        loopback_ipv6: bool,
    ) -> Result<(), NetworkError> {
        let mut connection = Connection::open().map_err(NetworkError::Open)?;
        let mut errors = Vec::new();
        let numbered = numbered(interfaces, &mut errors);
        let mut numbers: Vec<_> = numbered.iter().map(|(it, number)| (it.index, *number)).collect();
        numbers.push((LOOPBACK_NUMBER, LOOPBACK_NUMBER));
        let messages =
            settings.iter().map(|setting| decode(setting)).collect::<io::Result<Vec<_>>>();
        let messages = messages.map_err(NetworkError::Open)?.into_iter();
        let wanted: Vec<_> = messages.filter_map(|it| renumbered(it, &numbers)).collect();
        if self.loopback_ipv6 != Some(loopback_ipv6) {
            self.loopback_ipv6 = Some(loopback_ipv6);
            let switched = switch(LOOPBACK, IPV6_OFF, if loopback_ipv6 { "0" } else { "1" });
            errors.extend(of(LOOPBACK, switched));
        }
        let changed = self.set_up(&mut connection, numbered, &mut errors);
        if changed || wanted != self.settings {
            // Without duplicate address detection: the host has done it.
            self.detect("0", &mut errors);
            self.set(&mut connection, wanted, changed, &mut errors);
            self.settle();
            self.detect("1", &mut errors);
            self.generate(&mut errors);
        }
        errors.into_iter().next().map_or(Ok(()), Err)
    }

    /// Sets interfaces up; returns whether any of them has changed.
    fn set_up(
        &mut self,
        connection: &mut Connection,
        interfaces: Vec<(Interface, u32)>,
        errors: &mut Vec<NetworkError>,
    ) -> bool {
        let before = std::mem::replace(&mut self.interfaces, interfaces);
        let changed = || self.interfaces.iter().filter(|interface| !before.contains(interface));
        let was = |number: u32| {
            let known = before.iter().find(|(_, known)| *known == number);
            known.map(|(interface, _)| interface)
        };
        for (interface, number) in changed() {
            if was(*number).is_none_or(|was| was.name != interface.name) {
                // A temporary name, as another interface may still have the new one.
                let other_name = LinkAttribute::IfName(format!("slot{}", interface.slot));
                let freed = connection.set_link(*number, None, vec![other_name]);
                errors.extend(of(&interface.name, freed));
            }
        }
        for (interface, number) in changed() {
            let set_up = set_up(connection, interface, *number, was(*number));
            errors.extend(of(&interface.name, set_up));
        }
        changed().next().is_some()
    }

    /// Sets what is not set yet, or everything if `all`, and removes what is no longer wanted.
    fn set(
        &mut self,
        connection: &mut Connection,
        wanted: Vec<RouteNetlinkMessage>,
        all: bool,
        errors: &mut Vec<NetworkError>,
    ) {
        let before = std::mem::take(&mut self.settings);
        let lost: Vec<_> = before.iter().filter(|setting| !wanted.contains(setting)).collect();
        // With an address the kernel removes routes, even those that another address would keep.
        let all = all || !lost.is_empty();
        for setting in lost {
            undo(connection, setting.clone());
        }
        for setting in wanted {
            if (all || !before.contains(&setting))
                && let Err(error) = set(connection, setting.clone())
            {
                errors.push(NetworkError::Setting(format!("{setting:?}"), error));
                continue;
            }
            self.settings.push(setting);
        }
    }

    /// Switches duplicate address detection on or off.
    fn detect(&self, value: &str, errors: &mut Vec<NetworkError>) {
        for (interface, _) in &self.interfaces {
            let name = &interface.name;
            errors.extend(of(name, switch(name, DETECTION, value)));
        }
    }

    /// Waits until the kernel has seen that it need not look for duplicates: it does so for each
    /// address in a task of its own, and would look after all if detection were on again by then.
    fn settle(&self) {
        let usable = |name: &&str| {
            fs::read_to_string(format!("/sys/class/net/{name}/carrier"))
                .is_ok_and(|carrier| carrier.trim() == "1")
        };
        let names = self.interfaces.iter().map(|(interface, _)| interface.name.as_str());
        let names: Vec<&str> = names.filter(usable).collect();
        let deadline = Instant::now() + SETTLING;
        let tentative =
            || fs::read_to_string(ADDRESSES).is_ok_and(|all| is_tentative(&all, &names));
        while tentative() && Instant::now() < deadline {
            sleep(Duration::from_millis(1));
        }
    }

    /// From now on, makes the kernel give interfaces the link-local address that follows from their
    /// MAC address, if they have it on the host.
    fn generate(&self, errors: &mut Vec<NetworkError>) {
        for (interface, number) in &self.interfaces {
            if self.settings.iter().any(|setting| is_generated(setting, &interface.mac, *number)) {
                let name = &interface.name;
                errors.extend(of(name, switch(name, GENERATION, "0")));
            }
        }
    }

    /// Unbinds the interfaces in `slots`.
    ///
    /// # Errors
    /// When the driver cannot be unbound from one.
    pub(crate) fn release(&mut self, slots: &[u32]) -> io::Result<()> {
        self.interfaces.retain(|(interface, _)| !slots.contains(&interface.slot));
        for slot in slots {
            let name = format!("virtio-mmio.{slot}");
            let driver = slot_directory(Path::new(PLATFORM_BUS), *slot).join("driver");
            if fs::symlink_metadata(&driver).is_ok() {
                fs::write(driver.join("unbind"), name)?;
            }
        }
        Ok(())
    }
}

/// Interfaces with their numbers in the guest; each that does not exist is an error.
fn numbered(interfaces: Vec<Interface>, errors: &mut Vec<NetworkError>) -> Vec<(Interface, u32)> {
    let mut numbered = Vec::with_capacity(interfaces.len());
    for interface in interfaces {
        match find(Path::new(PLATFORM_BUS), interface.slot) {
            Some(number) => numbered.push((interface, number)),
            None => errors.push(NetworkError::Missing(interface.name, interface.slot)),
        }
    }
    numbered
}

/// The error of an interface, if there is one.
fn of(interface: &str, done: io::Result<()>) -> Option<NetworkError> {
    done.err().map(|error| NetworkError::Interface(interface.to_owned(), error))
}

fn slot_directory(bus: &Path, slot: u32) -> PathBuf {
    bus.join(format!("devices/virtio-mmio.{slot}"))
}

/// The number of the interface in a slot.
fn find(bus: &Path, slot: u32) -> Option<u32> {
    let device = fs::read_dir(slot_directory(bus, slot)).ok()?.flatten();
    let mut device =
        device.filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"));
    let mut interfaces = fs::read_dir(device.next()?.path().join("net")).ok()?.flatten();
    let interface = interfaces.next()?;
    let number = fs::read_to_string(interface.path().join("ifindex")).ok()?;
    number.trim().parse().ok()
}

/// Sets what differs from what it `was`.
fn set_up(
    connection: &mut Connection,
    interface: &Interface,
    number: u32,
    was: Option<&Interface>,
) -> io::Result<()> {
    let attributes = |it: &Interface| {
        [
            LinkAttribute::IfName(it.name.clone()),
            LinkAttribute::Address(it.mac.clone()),
            LinkAttribute::Mtu(it.mtu),
            LinkAttribute::TxQueueLen(it.queue_len),
        ]
    };
    let mut wanted = attributes(interface).to_vec();
    if let Some(was) = was {
        let known = attributes(was);
        wanted.retain(|attribute| !known.contains(attribute));
    }
    connection.set_link(number, None, wanted)?;
    switch(&interface.name, IPV6_OFF, if interface.ipv6 { "0" } else { "1" })?;
    // On the host it may have got its address when it had another MAC address, or have none.
    switch(&interface.name, GENERATION, "1")?;
    connection.set_link(number, Some(interface.up), Vec::new())
}

/// Whether an address of one of these interfaces is still checked for duplicates.
fn is_tentative(addresses: &str, names: &[&str]) -> bool {
    const TENTATIVE: u32 = 0x40; // IFA_F_TENTATIVE
    addresses.lines().any(|line| {
        // The address, the interface's number, the prefix's length, the scope, flags, the name.
        let [_, _, _, _, flags, name] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            return false;
        };
        let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
        names.contains(&name) && flags & TENTATIVE != 0
    })
}

/// Whether a setting is the address that follows from a MAC address: RFC 4291, appendix A.
fn is_generated(setting: &RouteNetlinkMessage, mac: &[u8], number: u32) -> bool {
    let (RouteNetlinkMessage::NewAddress(address), [a, b, c, d, e, f]) = (setting, mac) else {
        return false;
    };
    let generated = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, *b, *c, 0xff, 0xfe, *d, *e, *f];
    let generated = AddressAttribute::Address(Ipv6Addr::from(generated).into());
    address.header.index == number && address.attributes.contains(&generated)
}

/// Applies a setting, even if it is applied already. That a route is absent is a setting too.
fn set(connection: &mut Connection, setting: RouteNetlinkMessage) -> io::Result<()> {
    match setting {
        RouteNetlinkMessage::DelRoute(_) => match connection.change(setting, 0) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            set => set,
        },
        // The kernel never replaces rules: it would add another one.
        RouteNetlinkMessage::NewRule(_) => {
            match connection.change(setting, NLM_F_CREATE | NLM_F_EXCL) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                set => set,
            }
        }
        _ => connection.change(setting, NLM_F_CREATE | NLM_F_REPLACE),
    }
}

/// Undoes a setting, which may be gone already with an address or an interface.
fn undo(connection: &mut Connection, setting: RouteNetlinkMessage) {
    let opposite = match setting {
        RouteNetlinkMessage::NewAddress(address) => RouteNetlinkMessage::DelAddress(address),
        RouteNetlinkMessage::NewRoute(route) => RouteNetlinkMessage::DelRoute(route),
        RouteNetlinkMessage::DelRoute(route) => RouteNetlinkMessage::NewRoute(route),
        RouteNetlinkMessage::NewNeighbour(neighbour) => {
            RouteNetlinkMessage::DelNeighbour(neighbour)
        }
        RouteNetlinkMessage::NewRule(rule) => RouteNetlinkMessage::DelRule(rule),
        _ => return,
    };
    let comes_back = matches!(opposite, RouteNetlinkMessage::NewRoute(_));
    if let Err(error) = connection.change(opposite, if comes_back { NLM_F_CREATE } else { 0 }) {
        tracing::debug!(error = %error, "cannot take a setting of the host's back");
    }
}

/// Sets one of the switches that an interface has for IPv6.
fn switch(interface: &str, name: &str, value: &str) -> io::Result<()> {
    let switch = Path::new("/proc/sys/net/ipv6/conf").join(interface).join(name);
    match fs::write(switch, value) {
        // A kernel without IPv6 has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

/// Replaces the host's interface numbers in a message by the guest's; `None` if the message is
/// about an interface that the guest does not have.
fn renumbered(
    mut message: RouteNetlinkMessage,
    numbers: &[(u32, u32)],
) -> Option<RouteNetlinkMessage> {
    let here = |there: u32| {
        let found = numbers.iter().find(|(number, _)| *number == there);
        found.map(|(_, number)| *number)
    };
    match &mut message {
        RouteNetlinkMessage::NewAddress(address) => {
            address.header.index = here(address.header.index)?;
        }
        RouteNetlinkMessage::NewNeighbour(neighbour) => {
            neighbour.header.ifindex = here(neighbour.header.ifindex)?;
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
            for attribute in &mut route.attributes {
                match attribute {
                    RouteAttribute::Oif(index) => *index = here(*index)?,
                    RouteAttribute::MultiPath(hops) => {
                        for hop in hops {
                            hop.interface_index = here(hop.interface_index)?;
                        }
                    }
                    _ => {}
                }
            }
        }
        _ => {}
    }
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_netlink::route::address::AddressMessage;
    use bulkhead_netlink::route::route::{RouteMessage, RouteNextHop};

    #[test]
    fn an_address_that_is_checked_for_duplicates_is_known_by_its_flag() {
        let list = "fe8000000000000000fc00fffe000001 04 40 20 c0     eth0\n\
                    fd000000000000000000000000000002 05 40 00 80     eth1\n";
        assert!(is_tentative(list, &["eth1", "eth0"]));
        assert!(!is_tentative(list, &["eth1"]));
        assert!(!is_tentative("", &["eth0"]));
    }

    #[test]
    fn an_interface_is_found_by_its_slot() {
        let bus = tempfile::tempdir().unwrap();
        let net = bus.path().join("devices/virtio-mmio.12/virtio5/net/eth7");
        fs::create_dir_all(&net).unwrap();
        fs::write(net.join("ifindex"), "9\n").unwrap();
        assert_eq!(find(bus.path(), 12), Some(9));
        assert_eq!(find(bus.path(), 13), None);
    }

    #[test]
    fn an_address_that_follows_from_another_mac_address_is_not_generated() {
        let mut address = AddressMessage::default();
        let generated: Ipv6Addr = "fe80::ff:fe00:902".parse().unwrap();
        address.header.index = 3;
        address.attributes = vec![AddressAttribute::Address(generated.into())];
        let setting = RouteNetlinkMessage::NewAddress(address);
        assert!(is_generated(&setting, &[2, 0, 0, 0, 9, 2], 3));
        assert!(!is_generated(&setting, &[2, 0, 0, 0, 9, 3], 3));
        assert!(!is_generated(&setting, &[2, 0, 0, 0, 9, 2], 4));
    }

    #[test]
    fn a_route_has_the_numbers_of_this_side() {
        let mut hop = RouteNextHop::default();
        hop.interface_index = 40;
        let mut route = RouteMessage::default();
        route.attributes = vec![
            RouteAttribute::Oif(41),
            RouteAttribute::MultiPath(vec![hop]),
            RouteAttribute::Priority(41),
        ];
        let message = RouteNetlinkMessage::NewRoute(route);
        assert_eq!(renumbered(message.clone(), &[(41, 3)]), None);
        let message = renumbered(message, &[(40, 2), (41, 3)]);
        let Some(RouteNetlinkMessage::NewRoute(route)) = message else { panic!("a route") };
        assert_eq!(route.attributes[0], RouteAttribute::Oif(3));
        let RouteAttribute::MultiPath(hops) = &route.attributes[1] else { panic!("hops") };
        assert_eq!(hops[0].interface_index, 2);
        assert_eq!(route.attributes[2], RouteAttribute::Priority(41));
    }
}
