//! The state machine of a container: OCI runtime-spec, "State" and "Lifecycle". It does no I/O.
//!
//! ```text
//!              Prepared           Started            Frozen
//!   Creating ───────────► Created ─────────► Running ────────► Paused
//!       │                  │ ▲ │               │  ◄────────────  │
//!       │           Frozen │ │ │ Exited        │     Thawed      │ Exited
//!       │                  ▼ │ Thawed          │ Exited          │
//!       │          CreatedPaused               │                 │
//!       │ Exited           │ Exited            │                 │
//!       ▼                  ▼                   ▼                 ▼
//!     Stopped ◄────────────┴───────────────────┴──────────────────
//! ```
//!
//! As in runc, a container that was paused before it was started is shown as paused; when it is
//! resumed, its status is "created" again.
//!
//! A signal is not an event; the exit that it may cause is. [`crate::supervisor::container`] acts
//! on the processes.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Where a container is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its machine is being started.
    Creating,
    /// Its init process waits to execute the user's program.
    Created,
    /// The user's program runs. This is also the default for an unknown status, so that the
    /// container is ended before it is removed.
    #[default]
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its init process was frozen before the user's program was started.
    CreatedPaused,
    /// Its init process has ended.
    Stopped,
}

/// What happens to a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Its init process exists.
    Prepared,
    /// The user's program was started.
    Started,
    /// All its processes were frozen.
    Frozen,
    /// They run again.
    Thawed,
    /// Its init process or its machine ended.
    Exited,
}

/// An event that cannot happen in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("cannot {} a container that is {from}", verb(*.event))]
pub struct InvalidTransition {
    /// The state.
    pub from: Status,
    /// The event.
    pub event: Event,
}

impl Status {
    /// The state after `event`.
    ///
    /// # Errors
    /// When the event cannot happen in this state.
    pub const fn on(self, event: Event) -> Result<Self, InvalidTransition> {
        match (self, event) {
            (Self::Creating, Event::Prepared) => Ok(Self::Created),
            (Self::Created, Event::Started) | (Self::Paused, Event::Thawed) => Ok(Self::Running),
            (Self::Running, Event::Frozen) => Ok(Self::Paused),
            (Self::Created, Event::Frozen) => Ok(Self::CreatedPaused),
            (Self::CreatedPaused, Event::Thawed) => Ok(Self::Created),
            (Self::Stopped, Event::Exited) => Err(InvalidTransition { from: self, event }),
            (_, Event::Exited) => Ok(Self::Stopped),
            (from, event) => Err(InvalidTransition { from, event }),
        }
    }

    /// Whether its processes are frozen.
    #[must_use]
    pub const fn is_paused(self) -> bool {
        matches!(self, Self::Paused | Self::CreatedPaused)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused | Self::CreatedPaused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

const fn verb(event: Event) -> &'static str {
    match event {
        Event::Prepared => "create",
        Event::Started => "start",
        Event::Frozen => "pause",
        Event::Thawed => "resume",
        Event::Exited => "end",
    }
}

#[cfg(test)]
mod tests {
    use super::Event::{Exited, Frozen, Prepared, Started, Thawed};
    use super::Status::{Created, CreatedPaused, Creating, Paused, Running, Stopped};
    use super::*;

    #[test]
    fn every_state_answers_every_event_as_in_the_diagram() {
        let events = [Prepared, Started, Frozen, Thawed, Exited];
        let table = [
            (Creating, [Some(Created), None, None, None, Some(Stopped)]),
            (Created, [None, Some(Running), Some(CreatedPaused), None, Some(Stopped)]),
            (CreatedPaused, [None, None, None, Some(Created), Some(Stopped)]),
            (Running, [None, None, Some(Paused), None, Some(Stopped)]),
            (Paused, [None, None, None, Some(Running), Some(Stopped)]),
            (Stopped, [None, None, None, None, None]),
        ];
        for (from, row) in table {
            for (event, expected) in events.into_iter().zip(row) {
                let expected = expected.ok_or(InvalidTransition { from, event });
                assert_eq!(from.on(event), expected, "{from} on {event:?}");
            }
        }
    }

    #[test]
    fn a_refusal_names_the_verb_and_the_state() {
        let error = Running.on(Started).unwrap_err();
        assert_eq!(error.to_string(), "cannot start a container that is running");
    }

    #[test]
    fn the_names_are_those_of_the_specification() {
        let names = [Creating, Created, Running, Paused, CreatedPaused, Stopped];
        assert_eq!(
            names.map(|name| name.to_string()).join(","),
            "creating,created,running,paused,paused,stopped"
        );
    }
}
