//! Which frames a driver wants to receive, VIRTIO 1.3 §5.1.6.5.1 and §5.1.6.5.2.
//!
//! The filter spares the guest work. It protects nobody: a driver that wants all frames gets them.

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

impl Mac {
    const BROADCAST: Self = Self([0xff; 6]);

    pub(super) fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

/// The longest list of addresses that is compared; a longer one matches all addresses.
pub(super) const LISTED_MAX: usize = 64;

/// Addresses of one kind that a driver listens to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Listed {
    All,
    These(Vec<Mac>),
}

impl Listed {
    fn has(&self, mac: Mac) -> bool {
        match self {
            Self::All => true,
            Self::These(listed) => listed.contains(&mac),
        }
    }
}

/// What a driver has asked to receive.
#[derive(Debug)]
pub(super) struct Filter {
    /// The address of the interface.
    pub(super) own: Mac,
    pub(super) promiscuous: bool,
    pub(super) all_multicast: bool,
    pub(super) unicast: Listed,
    pub(super) multicast: Listed,
}

impl Filter {
    /// Lets everything pass until the driver says what it wants.
    pub(super) fn new(own: Mac) -> Self {
        let none = || Listed::These(Vec::new());
        Self { own, promiscuous: true, all_multicast: false, unicast: none(), multicast: none() }
    }

    /// Whether the driver wants a frame for `destination`.
    pub(super) fn wants(&self, destination: Mac) -> bool {
        if self.promiscuous || destination == Mac::BROADCAST {
            return true;
        }
        if destination.is_multicast() {
            return self.all_multicast || self.multicast.has(destination);
        }
        destination == self.own || self.unicast.has(destination)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const GROUP: Mac = Mac([0x33, 0x33, 0, 0, 0, 1]);

    fn wanted(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, Mac::BROADCAST].map(|mac| filter.wants(mac))
    }

    #[test]
    fn what_a_driver_asks_for_passes() {
        let mut filter = Filter::new(OWN);
        assert_eq!(wanted(&filter), [true; 4]);
        filter.promiscuous = false;
        assert_eq!(wanted(&filter), [true, false, false, true]);
        filter.all_multicast = true;
        assert_eq!(wanted(&filter), [true, false, true, true]);
        filter.all_multicast = false;
        filter.unicast = Listed::These(vec![OTHER]);
        assert_eq!(wanted(&filter), [true, true, false, true]);
        filter.multicast = Listed::These(vec![GROUP]);
        assert_eq!(wanted(&filter), [true; 4]);
        filter.multicast = Listed::All;
        filter.own = GROUP;
        assert_eq!(wanted(&filter), [false, true, true, true]);
    }
}
