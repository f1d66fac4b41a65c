//! Waits until the guest of a new pod has booted and its agent answers.

use std::fs::File;
use std::io::Read;

use bulkhead_protocol::AGENT_PORT;
use rustix::fs::OFlags;
use tokio::time::timeout;

use super::{CONSOLE, PodError, random};
use crate::bundle::PodPlan;
use crate::machine::agent::Agent;
use crate::machine::monitor::{self, Machine, MachineError};
use crate::machine::settings;
use crate::state::Home;
use crate::trace::Phase;

/// Waits for the agent of a machine that boots, and sends it the pod's configuration.
///
/// # Errors
/// Quotes the console when the guest does not come up in time.
pub(super) async fn boot(
    home: &Home,
    machine: &Machine,
    plan: &PodPlan,
) -> Result<Agent, PodError> {
    let patience = plan.boot_timeout;
    let phase = Phase::begin("kernel to agent");
    // Read while the guest boots.
    let settings = settings::of_host();
    let came_up = async {
        let stream = machine.open_stream(AGENT_PORT, patience).await?;
        let agent = Agent::connect(stream).await?;
        let mut entropy = [0; 64];
        random(&mut entropy).map_err(|error| PodError::Io("/dev/urandom", error))?;
        let kernel = agent.hello((&plan.hostname, &entropy), &plan.sysctls, settings).await?;
        tracing::debug!(kernel, "guest is up");
        // A pod with fewer processors than planned can still run.
        if plan.size.vcpus > 1
            && let Err(error) = agent.start_processors(plan.size.vcpus.into()).await
        {
            tracing::warn!(error = %error, "cannot start a processor of the guest");
        }
        Ok(agent)
    };
    let result = tokio::select! {
        result = timeout(patience, came_up) => result,
        words = machine.ended() => Ok(Err(MachineError::Ended(words).into())),
    };
    phase.end();
    match result {
        Ok(Ok(agent)) => Ok(agent),
        // The monitor's message quotes the console already; other messages do not.
        Ok(Err(error @ PodError::Machine(MachineError::Ended(_)))) => Err(error),
        // The guest is up, but the agent rejects the pod's configuration.
        Ok(Err(PodError::Agent(error))) if error.is_invalid() => Err(error.into()),
        Ok(Err(error)) => {
            tracing::warn!(error = %error, "guest did not come up");
            Err(PodError::Boot { patience, console: last_words(home) })
        }
        Err(_) => Err(PodError::Boot { patience, console: last_words(home) }),
    }
}

/// The end of the console's log, for an error message; the monitor keeps the log short.
fn last_words(home: &Home) -> String {
    let mut bytes = Vec::new();
    let read = |mut file: File| file.read_to_end(&mut bytes);
    // A log that cannot be read is not quoted.
    let _ = home.file(CONSOLE, OFlags::RDONLY).and_then(read);
    let lines: Vec<_> = String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
    match monitor::quote(&lines) {
        quoted if quoted.is_empty() => "; it wrote nothing to its console".to_owned(),
        quoted => quoted,
    }
}
