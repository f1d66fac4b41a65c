//! Joins two interfaces, so that frames that arrive at one leave by the other: tc(8) with its
//! ingress qdisc and the mirred action.

use std::io;

use bulkhead_netlink::route::RouteNetlinkMessage;
use bulkhead_netlink::route::link::LinkAttribute;
use bulkhead_netlink::route::tc::{
    TcAction, TcActionAttribute, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterMatchAllOption, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
};
use bulkhead_netlink::{Connection, NLM_F_CREATE, NLM_F_EXCL};

use super::Interface;

/// The handle of the ingress qdisc.
pub(super) const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// Every protocol: `ETH_P_ALL` of Linux.
const ALL: u16 = 3;
/// After the filters that copy answers to the namespace.
const PRIORITY: u32 = super::answers::COUNT + 1;
/// The flags of a request to make something that does not exist yet.
pub(super) const NEW: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// Brings a tap up, with the MTU of its interface.
pub(super) fn fit(connection: &mut Connection, tap: u32, mtu: u32) -> io::Result<()> {
    connection.set_link(tap, Some(true), vec![LinkAttribute::Mtu(mtu)])
}

/// Takes an interface by adding an ingress qdisc. Fails if it has one: another program uses it.
pub(super) fn take(connection: &mut Connection, one: u32) -> io::Result<()> {
    connection.change(RouteNetlinkMessage::NewQueueDiscipline(ingress(one)?), NEW)
}

/// Sets the queue length of an interface that had none back to 0: the kernel changes it when a
/// qdisc is added.
pub(super) fn keep_queue(connection: &mut Connection, interface: &Interface) -> io::Result<()> {
    if interface.queue_len > 0 {
        return Ok(());
    }
    connection.set_link(interface.index, None, vec![LinkAttribute::TxQueueLen(0)])
}

/// Joins two interfaces that were taken.
pub(super) fn join(connection: &mut Connection, one: u32, other: u32) -> io::Result<()> {
    for (from, to) in [(one, other), (other, one)] {
        connection.change(RouteNetlinkMessage::NewTrafficFilter(redirect(from, to)?), NEW)?;
    }
    Ok(())
}

/// Gives back an interface that was taken, whether it was joined or not.
pub(super) fn part(connection: &mut Connection, one: u32) -> io::Result<()> {
    connection.change(RouteNetlinkMessage::DelQueueDiscipline(ingress(one)?), 0)
}

/// Whether an interface is redirected to an interface that is gone.
pub(super) fn leads_nowhere(connection: &mut Connection, one: u32) -> io::Result<bool> {
    Ok(leads_to(connection, one)?.contains(&0))
}

/// The interfaces that an interface is redirected to; 0 stands for one that is gone.
pub(super) fn leads_to(connection: &mut Connection, one: u32) -> io::Result<Vec<u32>> {
    let mut request = TcMessage::default();
    request.header.index = i32::try_from(one).map_err(io::Error::other)?;
    request.header.parent = INGRESS;
    let filters = connection.list(&RouteNetlinkMessage::GetTrafficFilter(request))?;
    let targets = |message: &RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewTrafficFilter(filter) => targets(filter),
        _ => Vec::new(),
    };
    Ok(filters.iter().flat_map(targets).collect())
}

/// The interfaces that a filter redirects to.
fn targets(filter: &TcMessage) -> Vec<u32> {
    let mut targets = Vec::new();
    for attribute in &filter.attributes {
        let TcAttribute::Options(options) = attribute else { continue };
        for option in options {
            let TcOption::MatchAll(TcFilterMatchAllOption::Action(actions)) = option else {
                continue;
            };
            let attributes = actions.iter().flat_map(|action| &action.attributes);
            targets.extend(attributes.flat_map(redirected));
        }
    }
    targets
}

fn redirected(attribute: &TcActionAttribute) -> Option<u32> {
    let TcActionAttribute::Options(options) = attribute else { return None };
    options.iter().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => {
            (mirror.eaction == TcMirrorActionType::EgressRedir).then_some(mirror.ifindex)
        }
        _ => None,
    })
}

fn ingress(index: u32) -> io::Result<TcMessage> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).map_err(io::Error::other)?;
    message.header.handle = INGRESS;
    message.header.parent = TcHandle::INGRESS;
    message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    Ok(message)
}

fn redirect(from: u32, to: u32) -> io::Result<TcMessage> {
    let action = mirred(to, TcMirrorActionType::EgressRedir, TcActionType::Stolen);
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(from).map_err(io::Error::other)?;
    message.header.parent = INGRESS;
    message.header.info = PRIORITY << 16 | u32::from(ALL.to_be());
    message.attributes = vec![
        TcAttribute::Kind("matchall".to_owned()),
        TcAttribute::Options(vec![TcOption::MatchAll(TcFilterMatchAllOption::Action(vec![
            action,
        ]))]),
    ];
    Ok(message)
}

/// The action that sends a frame, or a copy of it, out by another interface; `then` says what
/// happens to the frame afterwards.
pub(super) fn mirred(to: u32, how: TcMirrorActionType, then: TcActionType) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = then;
    mirror.eaction = how;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.tab = 1;
    action.attributes = vec![
        TcActionAttribute::Kind("mirred".to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirection_has_one_target_and_other_filters_have_none() {
        assert_eq!(targets(&redirect(7, 9).unwrap()), [9]);
        assert!(targets(&ingress(7).unwrap()).is_empty());
    }
}
