//! Gives a new pod's guest the host's binary formats, before there are containers.

use crate::machine::agent::Agent;
use crate::machine::file_server::FileServer;
use crate::machine::formats::Formats;

/// Shares the interpreters and has the agent register the formats. A pod without them can still
/// run.
pub(super) async fn register(formats: Formats, file_server: &FileServer, agent: &Agent) {
    let Formats { request, interpreters } = formats;
    if !interpreters.is_empty()
        && let Err(error) = file_server.show_interpreters(interpreters).await
    {
        tracing::warn!(error = %error, "cannot share the interpreters of the host's formats");
    }
    if let Err(error) = agent.register_formats(request).await {
        tracing::warn!(error = %error, "the host's formats are not the guest's");
    }
}
