//! Reads a network namespace: its interfaces, and what is set on them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_netlink::route::address::{
    AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope,
};
use bulkhead_netlink::route::link::{
    AfSpecInet6, AfSpecUnspec, LinkAttribute, LinkFlags, LinkLayerType, LinkMessage,
};
use bulkhead_netlink::route::neighbour::{NeighbourMessage, NeighbourState};
use bulkhead_netlink::route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use bulkhead_netlink::route::rule::{RuleAttribute, RuleMessage};
use bulkhead_netlink::route::{AddressFamily, RouteNetlinkMessage};
use bulkhead_netlink::{Connection, encode};
use thiserror::Error;

use super::{redirect, tap};

/// The table of the routes that the kernel makes by itself when an address is set.
const TABLE_LOCAL: u32 = 255;
/// The metric of a route that comes with an IPv6 address. With an IPv4 address it is 0, and the
/// attribute is left out.
const PRIORITY_OF_ADDRESS: u32 = 256;

/// The loopback's number in every network namespace.
const LOOPBACK: u32 = 1;

/// Tunnels that carry Ethernet. The kernel adds one of each to every network namespace.
const KERNEL_INTERFACES: [&str; 2] = ["gretap0", "erspan0"];

/// An interface that the guest gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// The most bytes of a packet after its Ethernet header.
    pub mtu: u32,
    /// The most packets that wait to be sent.
    pub queue_len: u32,
    /// It is up.
    pub up: bool,
    /// It has a carrier. An interface that is down cannot tell, and counts as having one.
    pub carrier: bool,
    /// It has IPv6.
    pub ipv6: bool,
}

/// An interface that cannot be mirrored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "interface {0} is not an Ethernet interface, the only kind that the guest supports; take it out"
)]
pub struct Unusable(String);

/// The interfaces that somebody has put into the namespace: the number of each, with the interface
/// or why it cannot be mirrored. The kernel's own, which are down in every namespace, are left out.
pub(super) fn interfaces(
    connection: &mut Connection,
) -> io::Result<Vec<(u32, Result<Interface, Unusable>)>> {
    let found = |link: &LinkMessage| Some((link.header.index, interface(link).transpose()?));
    Ok(links(connection)?.iter().filter_map(found).collect())
}

/// The tap of Bulkhead that an interface is redirected to, if any.
pub(super) fn tap_of(connection: &mut Connection, index: u32) -> io::Result<Option<String>> {
    let targets = redirect::leads_to(connection, index)?;
    let mut links = links(connection)?.into_iter();
    let target = links.find(|link| targets.contains(&link.header.index));
    let names = target.into_iter().flat_map(|link| link.attributes);
    Ok(names.filter_map(name).find(|name| name.starts_with(tap::PREFIX)))
}

fn name(attribute: LinkAttribute) -> Option<String> {
    match attribute {
        LinkAttribute::IfName(name) => Some(name),
        _ => None,
    }
}

/// Whether IPv6 is switched on for the namespace's loopback.
pub(super) fn loopback_has_ipv6(connection: &mut Connection) -> io::Result<bool> {
    let links = links(connection)?.into_iter().filter(|link| link.header.index == LOOPBACK);
    Ok(links.flat_map(|link| link.attributes).any(|attribute| match attribute {
        LinkAttribute::AfSpecUnspec(families) => has_ipv6(&families),
        _ => false,
    }))
}

/// All interfaces of the namespace.
pub(super) fn links(connection: &mut Connection) -> io::Result<Vec<LinkMessage>> {
    let listed = connection.list(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let link = |message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    };
    Ok(listed.into_iter().filter_map(link).collect())
}

fn interface(link: &LinkMessage) -> Result<Option<Interface>, Unusable> {
    let (header, up) = (&link.header, link.header.flags.contains(LinkFlags::Up));
    if header.flags.contains(LinkFlags::Loopback) {
        return Ok(None);
    }
    let mut interface = Interface {
        index: header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 0,
        queue_len: 0,
        up,
        carrier: !up || header.flags.contains(LinkFlags::LowerUp),
        ipv6: false,
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => interface.mtu = *mtu,
            LinkAttribute::TxQueueLen(length) => interface.queue_len = *length,
            LinkAttribute::Address(mac) => {
                interface.mac = mac.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::AfSpecUnspec(families) => interface.ipv6 = has_ipv6(families),
            _ => {}
        }
    }
    let ethernet = header.link_layer_type == LinkLayerType::Ether;
    let kernels = KERNEL_INTERFACES.contains(&interface.name.as_str());
    if !up && (kernels || !ethernet) {
        // Tunnels, which the kernel puts into every namespace.
        return Ok(None);
    }
    if !ethernet {
        return Err(Unusable(interface.name));
    }
    Ok(Some(interface))
}

fn has_ipv6(families: &[AfSpecUnspec]) -> bool {
    let settings = families.iter().filter_map(|family| match family {
        AfSpecUnspec::Inet6(settings) => Some(settings),
        _ => None,
    });
    settings.flatten().any(|setting| match setting {
        AfSpecInet6::DevConf(switches) => switches.disable_ipv6 == 0,
        _ => false,
    })
}

/// Addresses, routes and static neighbours of the interfaces that are `known`, routes of no
/// interface, and rules of policy routing. `known` also says whether an interface is up.
pub(super) fn settings(
    connection: &mut Connection,
    known: impl Fn(u32) -> Option<Up>,
) -> io::Result<Vec<Vec<u8>>> {
    let mut settings = Vec::new();
    let mut made = Vec::new();
    for message in connection.list(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))? {
        if let RouteNetlinkMessage::NewAddress(address) = message
            && (known(address.header.index).is_some() || is_added_to_loopback(&address))
        {
            if known(address.header.index) == Some(Up(true)) {
                made.extend(route_of(&address));
            }
            settings.push(RouteNetlinkMessage::NewAddress(as_is(address)));
        }
    }
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for message in connection.list(&RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                made.retain(|made| !is_like(&route, made));
                let known = |index| index == LOOPBACK || known(index).is_some();
                routes.extend(kept(route, known));
            }
        }
    }
    // The guest's kernel makes these routes too, but here somebody has removed them.
    settings.extend(made.into_iter().map(RouteNetlinkMessage::DelRoute));
    // Routes without a gateway come first, because gateways are reached by them.
    routes.sort_by_key(needs_gateway);
    settings.extend(routes.into_iter().map(RouteNetlinkMessage::NewRoute));
    let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
    for message in connection.list(&request)? {
        if let RouteNetlinkMessage::NewNeighbour(neighbour) = message
            && known(neighbour.header.ifindex).is_some()
            && neighbour.header.state == NeighbourState::Permanent
        {
            settings.push(RouteNetlinkMessage::NewNeighbour(neighbour));
        }
    }
    let rules = connection.list(&RouteNetlinkMessage::GetRule(RuleMessage::default()))?;
    settings.extend(rules.into_iter().filter(is_somebodys_rule));
    Ok(settings.into_iter().map(encode).collect())
}

/// Whether an interface is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Up(pub(super) bool);

/// The route to the link that the kernel adds with an address of an interface that is up.
fn route_of(address: &AddressMessage) -> Option<RouteMessage> {
    let AddressMessage { header, attributes, .. } = address;
    let find = |what: fn(&AddressAttribute) -> Option<IpAddr>| attributes.iter().find_map(what);
    // On a point-to-point link this is the peer's address.
    let there = find(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    })?;
    let here = find(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let len = u32::from(header.prefix_len);
    let mut route = RouteMessage::default();
    let (scope, destination) = match there {
        // An address alone on its link: the kernel adds no route.
        IpAddr::V4(_) if len == 32 && here.is_none_or(|here| here == there) => return None,
        IpAddr::V4(there) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(len)).unwrap_or(0);
            (RouteScope::Link, IpAddr::from(Ipv4Addr::from_bits(there.to_bits() & mask)))
        }
        IpAddr::V6(there) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(len)).unwrap_or(0);
            route.attributes.push(RouteAttribute::Priority(PRIORITY_OF_ADDRESS));
            (RouteScope::Universe, IpAddr::from(Ipv6Addr::from_bits(there.to_bits() & mask)))
        }
    };
    route.header.address_family = header.family;
    route.header.destination_prefix_length = header.prefix_len;
    (route.header.scope, route.header.protocol) = (scope, RouteProtocol::Kernel);
    (route.header.table, route.header.kind) = (RouteHeader::RT_TABLE_MAIN, RouteType::Unicast);
    route.attributes.push(RouteAttribute::Destination(destination.into()));
    route.attributes.push(RouteAttribute::Oif(header.index));
    Some(route)
}

/// Whether a route is the one that the kernel would have made.
fn is_like(route: &RouteMessage, made: &RouteMessage) -> bool {
    let RouteHeader { protocol, destination_prefix_length: len, table, .. } = route.header;
    let mut same = made.attributes.iter();
    (protocol, len, table)
        == (made.header.protocol, made.header.destination_prefix_length, made.header.table)
        && same.all(|attribute| route.attributes.contains(attribute))
}

/// Whether somebody has added an address to the loopback. The kernel sets the first ones itself, in
/// the guest as on the host.
fn is_added_to_loopback(address: &AddressMessage) -> bool {
    address.header.index == LOOPBACK && address.header.scope != AddressScope::Host
}

/// A rule of policy routing that the kernel does not make by itself.
fn is_somebodys_rule(message: &RouteNetlinkMessage) -> bool {
    let kernels = RuleAttribute::Protocol(RouteProtocol::Kernel);
    matches!(message, RouteNetlinkMessage::NewRule(rule) if !rule.attributes.contains(&kernels))
}

/// An address as it can be set, without what the host's kernel has noted about it.
fn as_is(mut address: AddressMessage) -> AddressMessage {
    address.header.flags.remove(AddressHeaderFlags::Tentative);
    address.attributes.retain(|attribute| {
        !matches!(attribute, AddressAttribute::CacheInfo(_) | AddressAttribute::Flags(_))
    });
    address
}

/// Returns a route that somebody has set on `known` interfaces; the kernel's own come with the
/// addresses.
fn kept(mut route: RouteMessage, known: impl Fn(u32) -> bool) -> Option<RouteMessage> {
    let RouteHeader { table, protocol, kind, .. } = route.header;
    let table = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(table.into());
    let learnt = match protocol {
        RouteProtocol::Ra => true,
        // The kernel's routes in other tables were moved there.
        RouteProtocol::Kernel => table == u32::from(RouteHeader::RT_TABLE_MAIN),
        _ => false,
    };
    if table == TABLE_LOCAL || learnt || kind == RouteType::Multicast {
        return None;
    }
    route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
    let nowhere = matches!(
        kind,
        RouteType::BlackHole | RouteType::Unreachable | RouteType::Prohibit | RouteType::Throw
    );
    if nowhere {
        // With IPv6 the kernel names the loopback, which is not mirrored.
        route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
        return Some(route);
    }
    let ours = route.attributes.iter().all(|attribute| match attribute {
        RouteAttribute::Oif(index) => known(*index),
        RouteAttribute::MultiPath(hops) => hops.iter().all(|hop| known(hop.interface_index)),
        _ => true,
    });
    ours.then_some(route)
}

fn needs_gateway(route: &RouteMessage) -> bool {
    let by_gateway = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    };
    route.header.scope == RouteScope::Universe && route.attributes.iter().any(by_gateway)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_of_the_kernel_is_not_had() {
        let mut rule = RuleMessage::default();
        assert!(is_somebodys_rule(&RouteNetlinkMessage::NewRule(rule.clone())));
        rule.attributes = vec![RuleAttribute::Protocol(RouteProtocol::Kernel)];
        assert!(!is_somebodys_rule(&RouteNetlinkMessage::NewRule(rule)));
    }
    use bulkhead_netlink::route::link::Inet6DevConf;
    use bulkhead_netlink::route::route::{RouteAddress, RouteNextHop};

    fn link(name: &str, layer: LinkLayerType, flags: LinkFlags) -> LinkMessage {
        let mut link = LinkMessage::default();
        (link.header.index, link.header.link_layer_type, link.header.flags) = (7, layer, flags);
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(1400),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
        ];
        link
    }

    #[test]
    fn an_interface_that_somebody_made_is_had_up_or_down() {
        for flags in [LinkFlags::Up, LinkFlags::empty()] {
            let found = interface(&link("eth0", LinkLayerType::Ether, flags)).unwrap().unwrap();
            assert_eq!((found.name.as_str(), found.index, found.mtu), ("eth0", 7, 1400));
            assert_eq!((found.mac, found.up), ([2, 0, 0, 0, 0, 1], flags == LinkFlags::Up));
            assert!(!found.ipv6);
        }
    }

    #[test]
    fn an_interface_has_a_carrier_and_ipv6_as_the_kernel_says() {
        let mut message = link("eth0", LinkLayerType::Ether, LinkFlags::Up | LinkFlags::LowerUp);
        let switches = vec![AfSpecInet6::DevConf(Inet6DevConf::default())];
        let families = vec![AfSpecUnspec::Inet6(switches)];
        message.attributes.push(LinkAttribute::AfSpecUnspec(families));
        let plugged = interface(&message).unwrap().unwrap();
        assert_eq!((plugged.carrier, plugged.ipv6), (true, true));
        message.header.flags.remove(LinkFlags::LowerUp);
        assert!(!interface(&message).unwrap().unwrap().carrier);
        message.header.flags.remove(LinkFlags::Up);
        assert!(interface(&message).unwrap().unwrap().carrier);
    }

    #[test]
    fn what_the_kernel_put_there_is_not_and_what_is_no_ethernet_is_refused() {
        let none = LinkFlags::empty();
        for (name, layer, flags) in [
            ("lo", LinkLayerType::Loopback, LinkFlags::Up | LinkFlags::Loopback),
            ("sit0", LinkLayerType::Sit, none),
            ("gretap0", LinkLayerType::Ether, none),
        ] {
            assert_eq!(interface(&link(name, layer, flags)), Ok(None), "{name}");
        }
        let tunnel = link("wg0", LinkLayerType::None, LinkFlags::Up);
        let words = interface(&tunnel).unwrap_err().to_string();
        assert!(words.starts_with("interface wg0 is not an Ethernet interface"), "{words}");
    }

    fn route(protocol: RouteProtocol, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut route = RouteMessage::default();
        (route.header.protocol, route.header.kind) = (protocol, RouteType::Unicast);
        route.attributes = attributes;
        route
    }

    #[test]
    fn routes_that_somebody_set_by_known_interfaces_are_kept() {
        let known = |index| index == 7;
        let hop = |index| {
            let mut hop = RouteNextHop::default();
            hop.interface_index = index;
            hop
        };
        let by = |attribute| kept(route(RouteProtocol::Boot, vec![attribute]), known);
        assert!(by(RouteAttribute::Oif(7)).is_some());
        assert!(by(RouteAttribute::Oif(8)).is_none());
        assert!(by(RouteAttribute::MultiPath(vec![hop(7), hop(7)])).is_some());
        assert!(by(RouteAttribute::MultiPath(vec![hop(7), hop(8)])).is_none());
        assert!(by(RouteAttribute::Table(TABLE_LOCAL)).is_none());
        assert!(by(RouteAttribute::Table(100)).is_some());
        let of_kernel = |table| {
            let attributes = vec![RouteAttribute::Table(table), RouteAttribute::Oif(7)];
            kept(route(RouteProtocol::Kernel, attributes), known)
        };
        assert!(of_kernel(254).is_none());
        assert!(of_kernel(100).is_some());
    }

    fn address(there: &str, len: u8, here: &str) -> AddressMessage {
        let mut address = AddressMessage::default();
        let attributes = [("there", there), ("here", here)].map(|(_, it)| it.parse::<IpAddr>());
        let [there, here] = attributes.map(Result::unwrap);
        address.header.prefix_len = len;
        address.header.index = 7;
        address.attributes = vec![AddressAttribute::Address(there), AddressAttribute::Local(here)];
        address
    }

    #[test]
    fn an_address_makes_a_route_to_all_on_its_link() {
        let of = |there, len, here| {
            let route = route_of(&address(there, len, here))?;
            let destination = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(it)) => Some(it.to_string()),
                RouteAttribute::Destination(RouteAddress::Inet6(it)) => Some(it.to_string()),
                _ => None,
            });
            Some((destination?, route.header.destination_prefix_length))
        };
        assert_eq!(of("10.1.2.3", 20, "10.1.2.3"), Some(("10.1.0.0".into(), 20)));
        assert_eq!(of("10.1.2.3", 0, "10.1.2.3"), Some(("0.0.0.0".into(), 0)));
        assert_eq!(of("10.1.2.3", 32, "10.1.2.3"), None);
        assert_eq!(of("10.1.2.4", 32, "10.1.2.3"), Some(("10.1.2.4".into(), 32)));
        assert_eq!(of("fd01::5", 64, "fd01::5"), Some(("fd01::".into(), 64)));
        assert_eq!(of("fd01::5", 128, "fd01::5"), Some(("fd01::5".into(), 128)));
        let made = route_of(&address("fd01::5", 64, "fd01::5")).unwrap();
        let mut seen = made.clone();
        seen.attributes.push(RouteAttribute::Table(254));
        assert!(is_like(&seen, &made));
        seen.header.protocol = RouteProtocol::Static;
        assert!(!is_like(&seen, &made));
    }

    #[test]
    fn a_route_to_nowhere_is_of_no_interface() {
        let mut nowhere = route(RouteProtocol::Static, vec![RouteAttribute::Oif(1)]);
        nowhere.header.kind = RouteType::BlackHole;
        assert_eq!(kept(nowhere, |_| false).unwrap().attributes, []);
    }

    #[test]
    fn gateways_come_last() {
        let via = RouteAttribute::Gateway(RouteAddress::Inet([10, 0, 0, 1].into()));
        let mut routes = [
            route(RouteProtocol::Boot, vec![via]),
            route(RouteProtocol::Boot, vec![RouteAttribute::Oif(7)]),
        ];
        routes.sort_by_key(needs_gateway);
        assert_eq!(routes[0].attributes, [RouteAttribute::Oif(7)]);
    }
}
