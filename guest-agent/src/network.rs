//! The guest's interfaces, made as the host's are: names, addresses, routes, neighbours.
//!
//! The host sends the messages of rtnetlink(7) that its own kernel has; here they are said again to this
//! one, with the numbers that the interfaces have here.

use std::fs;
use std::io;
use std::path::Path;

use bulkhead_netlink::route::RouteNetlinkMessage;
use bulkhead_netlink::route::link::LinkAttribute;
use bulkhead_netlink::route::route::RouteAttribute;
use bulkhead_netlink::{Connection, NLM_F_CREATE, NLM_F_REPLACE, decode};
use bulkhead_protocol::agent::Interface;

use crate::hotplug::PLATFORM_BUS;

/// Whether an address is used only after nobody on the link has said that it is his.
const DETECTION: &str = "accept_dad";

/// Why the network is not as it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("network of the guest")]
    Open(#[source] io::Error),
    #[error("interface {0} of the host is in slot {1}, where no interface is")]
    Missing(String, u32),
    #[error("interface {0} cannot be set up")]
    Interface(String, #[source] io::Error),
    #[error("{0} cannot be set")]
    Setting(String, #[source] io::Error),
}

/// Makes interfaces that were bound as those of the host, and sets `settings` in their order.
///
/// # Errors
/// Names what the kernel refused; what was set before stays.
pub(crate) fn configure(
    interfaces: &[Interface],
    settings: &[Vec<u8>],
) -> Result<(), NetworkError> {
    let mut connection = Connection::open().map_err(NetworkError::Open)?;
    let mut numbers = Vec::with_capacity(interfaces.len());
    for interface in interfaces {
        let found = find(Path::new(PLATFORM_BUS), interface.slot);
        let number =
            found.ok_or_else(|| NetworkError::Missing(interface.name.clone(), interface.slot))?;
        // Each is to have a name that another may have been given here.
        let other_name = LinkAttribute::IfName(format!("slot{}", interface.slot));
        connection
            .set_link(number, false, vec![other_name])
            .map_err(|error| NetworkError::Interface(interface.name.clone(), error))?;
        numbers.push((interface.index, number));
    }
    for (interface, (_, number)) in interfaces.iter().zip(&numbers) {
        set_up(&mut connection, interface, *number)
            .map_err(|error| NetworkError::Interface(interface.name.clone(), error))?;
    }
    for setting in settings {
        let message = decode(setting).map_err(NetworkError::Open)?;
        let message = renumbered(message, &numbers);
        let said = format!("{message:?}");
        connection
            .change(message, NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|error| NetworkError::Setting(said, error))?;
    }
    for interface in interfaces {
        switch(interface, DETECTION, "1")
            .map_err(|error| NetworkError::Interface(interface.name.clone(), error))?;
    }
    Ok(())
}

/// The number of the interface in a slot.
fn find(bus: &Path, slot: u32) -> Option<u32> {
    let slot = bus.join(format!("devices/virtio-mmio.{slot}"));
    let device = fs::read_dir(slot).ok()?.flatten();
    let mut device =
        device.filter(|entry| entry.file_name().to_string_lossy().starts_with("virtio"));
    let mut interfaces = fs::read_dir(device.next()?.path().join("net")).ok()?.flatten();
    let interface = interfaces.next()?;
    let number = fs::read_to_string(interface.path().join("ifindex")).ok()?;
    number.trim().parse().ok()
}

fn set_up(connection: &mut Connection, interface: &Interface, number: u32) -> io::Result<()> {
    let attributes = vec![
        LinkAttribute::IfName(interface.name.clone()),
        LinkAttribute::Mtu(interface.mtu),
        LinkAttribute::TxQueueLen(interface.queue_len),
    ];
    connection.set_link(number, false, attributes)?;
    switch(interface, "disable_ipv6", if interface.ipv6 { "0" } else { "1" })?;
    // The host has found out that nobody else has its addresses.
    switch(interface, DETECTION, "0")?;
    if interface.up { connection.set_link(number, true, Vec::new()) } else { Ok(()) }
}

/// Sets one of the switches that an interface has for IPv6.
fn switch(interface: &Interface, name: &str, value: &str) -> io::Result<()> {
    let switch = Path::new("/proc/sys/net/ipv6/conf").join(&interface.name).join(name);
    match fs::write(switch, value) {
        // A kernel without IPv6 has none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        written => written,
    }
}

/// A message of the host with this guest's numbers of interfaces.
fn renumbered(mut message: RouteNetlinkMessage, numbers: &[(u32, u32)]) -> RouteNetlinkMessage {
    let here = |there: u32| {
        let found = numbers.iter().find(|(number, _)| *number == there);
        found.map_or(there, |(_, number)| *number)
    };
    match &mut message {
        RouteNetlinkMessage::NewAddress(address) => {
            address.header.index = here(address.header.index);
        }
        RouteNetlinkMessage::NewNeighbour(neighbour) => {
            neighbour.header.ifindex = here(neighbour.header.ifindex);
        }
        RouteNetlinkMessage::NewRoute(route) => {
            for attribute in &mut route.attributes {
                match attribute {
                    RouteAttribute::Oif(index) => *index = here(*index),
                    RouteAttribute::MultiPath(hops) => {
                        for hop in hops {
                            hop.interface_index = here(hop.interface_index);
                        }
                    }
                    _ => {}
                }
            }
        }
        _ => {}
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_netlink::route::route::{RouteMessage, RouteNextHop};

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
    fn a_route_has_the_numbers_of_this_side() {
        let mut hop = RouteNextHop::default();
        hop.interface_index = 40;
        let mut route = RouteMessage::default();
        route.attributes = vec![
            RouteAttribute::Oif(41),
            RouteAttribute::MultiPath(vec![hop]),
            RouteAttribute::Priority(41),
        ];
        let message = renumbered(RouteNetlinkMessage::NewRoute(route), &[(40, 2), (41, 3)]);
        let RouteNetlinkMessage::NewRoute(route) = message else { panic!("a route") };
        assert_eq!(route.attributes[0], RouteAttribute::Oif(3));
        let RouteAttribute::MultiPath(hops) = &route.attributes[1] else { panic!("hops") };
        assert_eq!(hops[0].interface_index, 2);
        assert_eq!(route.attributes[2], RouteAttribute::Priority(41));
    }
}
