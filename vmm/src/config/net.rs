//! The configuration of a network interface.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Fd, check_fd};

/// The most pairs of queues that an interface can have.
pub const PAIRS_MAX: usize = 8;
/// The least MTU that IPv4 works with.
const MTU_MIN: u16 = 68;

/// A network interface of the guest. The frames that it sends come out of a tap of the host, and it
/// receives the frames that the host sends to that tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// The taps, one for each pair of queues, all of one interface. The process that opened them
    /// has set them up: `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR` and, for more than one,
    /// `IFF_MULTI_QUEUE`; a header of 12 bytes (`TUNSETVNETHDRSZ`); nonblocking.
    pub taps: Vec<Fd>,
    /// `/dev/vhost-net`, opened once for each tap, if the host's kernel is to move the frames;
    /// empty if the monitor does. The kernel applies no limits.
    #[serde(default)]
    pub vhost: Vec<Fd>,
    /// The MAC address that the interface has at first.
    pub mac: [u8; 6],
    /// The longest packet, without its Ethernet header.
    pub mtu: u16,
    /// Limits what the guest receives.
    #[serde(default)]
    pub receive: RateLimit,
    /// Limits what the guest sends.
    #[serde(default)]
    pub transmit: RateLimit,
}

/// Rate limits; a field without a value is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of whole frames.
    #[serde(default)]
    pub bytes_per_s: Option<NonZeroU64>,
    /// Packets; a large one that is left to the receiver to segment counts as one.
    #[serde(default)]
    pub packets_per_s: Option<NonZeroU64>,
}

impl NetConfig {
    /// Checks every field; `field` is the device's place in the message.
    pub(super) fn validate(&self, field: &str, descriptors: usize) -> Result<(), ConfigError> {
        if !(1..=PAIRS_MAX).contains(&self.taps.len()) {
            let reason = format!("has {}, not between 1 and {PAIRS_MAX}", self.taps.len());
            return Err(ConfigError::new(format!("{field}.taps"), reason));
        }
        for (index, tap) in self.taps.iter().enumerate() {
            check_fd(&format!("{field}.taps[{index}]"), *tap, descriptors)?;
        }
        for (index, vhost) in self.vhost.iter().enumerate() {
            check_fd(&format!("{field}.vhost[{index}]"), *vhost, descriptors)?;
        }
        let limited = [self.receive, self.transmit] != [RateLimit::default(); 2];
        if !self.vhost.is_empty() && (self.vhost.len() != self.taps.len() || limited) {
            let reason =
                format!("has {}: one for each tap, and none with limits", self.vhost.len());
            return Err(ConfigError::new(format!("{field}.vhost"), reason));
        }
        if self.mac[0] & 1 != 0 || self.mac == [0; 6] {
            let reason = format!("{:x?} is not the address of one interface", self.mac);
            return Err(ConfigError::new(format!("{field}.mac"), reason));
        }
        if self.mtu < MTU_MIN {
            let reason = format!("{} is below {MTU_MIN}", self.mtu);
            return Err(ConfigError::new(format!("{field}.mtu"), reason));
        }
        Ok(())
    }
}
