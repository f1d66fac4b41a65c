//! The configuration of one file server, in its only form.
//!
//! The supervisor sends it as JSON in the first message on the control socket, with exactly two
//! descriptors beside it: [`SHARE_ROOT`] and [`RELAY`]. The file server answers with one
//! [`FsAnswer`]. From then on it reports what the guest's sockets need ([`FsReport`]), and the
//! supervisor answers some of it ([`FsVerdict`]). It exits when the control socket reaches end of
//! file.

use rustix::net::SocketType;
use serde::{Deserialize, Serialize};

use super::wire::Class;
use crate::config::{ConfigError, JailConfig};

/// The version of this shape; the file server refuses any other.
pub const VERSION: u32 = 3;
/// The fewest threads that serve requests: one more than the monitor lets be busy with slow
/// requests.
pub const THREADS_MIN: u8 = Class::Read.at_once() + 1;
/// The most threads that serve requests.
pub const THREADS_MAX: u8 = 32;
/// Index of the detached mount that becomes the root, among the message's descriptors.
pub const SHARE_ROOT: usize = 0;
/// Index of the SEQPACKET socket to the monitor, among the message's descriptors.
pub const RELAY: usize = 1;
/// How many descriptors come with the message.
pub const DESCRIPTORS: usize = 2;

/// One file server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// Must be [`VERSION`].
    pub version: u32,
    /// The identity that the file server takes. It keeps the capabilities that serving files needs,
    /// and takes the ids in a guest's request only while it creates something.
    pub jail: JailConfig,
    /// Threads that serve requests, [`THREADS_MIN`] to [`THREADS_MAX`].
    pub threads: u8,
    /// Sockets in shared directories lead to those of the host, and the other way round.
    pub sockets: bool,
}

/// The file server's answer to its configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsAnswer {
    /// Always `true`: jailed and serving.
    Ready(bool),
    /// Why it exits instead.
    Error(String),
}

/// What the guest's sockets need of the supervisor. One descriptor comes with each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FsReport {
    /// A process of the guest connects to the socket that the descriptor refers to (`O_PATH`). The
    /// supervisor answers with an [`FsVerdict`].
    Connect(ConnectWanted),
    /// A process of the guest listens, or takes datagrams, and the descriptor is the host's socket
    /// that does so for it. It is shut down when the guest's is closed. One for datagrams has
    /// `SO_PASSCRED`.
    Listen(Listening),
}

/// A connection that a process of the guest makes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectWanted {
    /// Names the request in the verdict.
    pub request: u64,
    /// Names the connection to the guest's agent.
    pub token: [u8; 16],
    /// The type of the process's socket.
    pub kind: SocketKind,
    /// The process's user and group, as the guest numbers them.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// Its supplementary groups, at most [`GROUPS_MAX`].
    pub groups: Vec<u32>,
}

/// A socket of the guest that listens, or takes datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listening {
    /// Names the socket to the guest.
    pub node: u64,
    /// Its type.
    pub kind: SocketKind,
}

/// The types of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SocketKind {
    /// A stream of bytes.
    Stream,
    /// A stream of packets.
    Seqpacket,
    /// Packets without a stream.
    Datagram,
}

impl SocketKind {
    /// What `socket(2)` calls it.
    #[must_use]
    pub const fn socket_type(self) -> SocketType {
        match self {
            Self::Stream => SocketType::STREAM,
            Self::Seqpacket => SocketType::SEQPACKET,
            Self::Datagram => SocketType::DGRAM,
        }
    }
}

/// The most supplementary groups of a [`ConnectWanted`].
pub const GROUPS_MAX: usize = 256;

/// What came of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsVerdict {
    /// As in [`ConnectWanted`].
    pub request: u64,
    /// Linux's number of the error; 0 if it is connected.
    pub error: i32,
}

impl FsConfig {
    /// Reads a configuration out of a message that brought `descriptors` descriptors.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn from_json(json: &[u8], descriptors: usize) -> Result<Self, ConfigError> {
        let config: Self = serde_json::from_slice(json)
            .map_err(|error| ConfigError::new("(message)", error.to_string()))?;
        config.validate(descriptors)?;
        Ok(config)
    }

    /// Checks every field against what the file server can do.
    ///
    /// # Errors
    /// Names the first field that cannot be used.
    pub fn validate(&self, descriptors: usize) -> Result<(), ConfigError> {
        if self.version != VERSION {
            let reason = format!("is {}, this file server speaks {VERSION}", self.version);
            return Err(ConfigError::new("version", reason));
        }
        self.jail.validate()?;
        if !(THREADS_MIN..=THREADS_MAX).contains(&self.threads) {
            let reason = format!("{} is not between {THREADS_MIN} and {THREADS_MAX}", self.threads);
            return Err(ConfigError::new("threads", reason));
        }
        if descriptors != DESCRIPTORS {
            let reason = format!("brought {descriptors} descriptors, {DESCRIPTORS} are needed");
            return Err(ConfigError::new("(message)", reason));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"version":3,"jail":{"uid":1000,"gid":1001},"threads":6,"sockets":true}"#;

    #[test]
    fn a_complete_configuration_is_read() {
        let config = FsConfig::from_json(GOOD.as_bytes(), 2).unwrap();
        assert_eq!((config.jail.uid, config.jail.gid, config.threads), (1000, 1001, 6));
    }

    #[test]
    fn errors_name_the_field() {
        for (from, to, field) in [
            ("\"version\":3", "\"version\":2", "version"),
            ("\"uid\":1000", "\"uid\":0", "jail.uid"),
            ("\"gid\":1001", "\"gid\":4294967295", "jail.gid"),
            ("\"threads\":6", "\"threads\":5", "threads"),
            ("\"threads\":6", "\"threads\":33", "threads"),
            ("\"threads\":6", "\"threads\":6,\"root\":\"/\"", "(message)"),
        ] {
            let error = FsConfig::from_json(GOOD.replace(from, to).as_bytes(), 2).unwrap_err();
            assert_eq!(error.field, field, "{to}");
        }
    }

    #[test]
    fn both_descriptors_are_needed_and_no_more() {
        for descriptors in [0, 1, 3] {
            let error = FsConfig::from_json(GOOD.as_bytes(), descriptors).unwrap_err();
            assert_eq!(error.field, "(message)");
        }
    }

    #[test]
    fn the_answers_are_the_documented_json() {
        assert_eq!(serde_json::to_string(&FsAnswer::Ready(true)).unwrap(), r#"{"ready":true}"#);
        let error = FsAnswer::Error("field version: is 2".into());
        assert_eq!(serde_json::to_string(&error).unwrap(), r#"{"error":"field version: is 2"}"#);
    }
}
