//! The agent as what it is for: PID 1 of a machine, called over the monitor's vsock. What needs no
//! machine is tested in the agent's own package.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::agent::agent_client::AgentClient;
use bulkhead_protocol::agent::{HelloRequest, RescanRequest, SyncRequest};
use bulkhead_protocol::{AGENT_PORT, VERSION};
use bulkhead_tests::vm::{Options, TestVm};
use bulkhead_vmm::config::{DeviceConfig, Fd};
use bulkhead_vmm::control::Request;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

const BOOT: Duration = Duration::from_secs(60);
/// The slot of the disk that is attached late; Linux numbers its platform devices likewise.
const DISK_SLOT: u8 = 9;

/// A client on a stream that the monitor opened. The stream can be used once, like its channel.
async fn client(stream: UnixStream) -> AgentClient<Channel> {
    stream.set_nonblocking(true).unwrap();
    let mut stream = Some(tokio::net::UnixStream::from_std(stream).unwrap());
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| std::io::Error::other("the stream was used"));
        async move { stream.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://agent");
    AgentClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

fn hello() -> HelloRequest {
    HelloRequest {
        version: VERSION,
        time_ns: 1_700_000_000_000_000_000,
        entropy: vec![1; 64],
        hostname: "pod".to_owned(),
    }
}

#[test]
fn the_agent_takes_time_and_entropy_and_binds_what_is_attached_late() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut vm = TestVm::boot(&Options::default()).unwrap();
    let stream = vm.open_stream(AGENT_PORT, BOOT).unwrap();
    runtime.block_on(async {
        let mut agent = client(stream).await;
        let reply = agent.hello(hello()).await.unwrap().into_inner();
        assert_eq!(reply.version, VERSION);
        let bound = agent.rescan(RescanRequest {}).await.unwrap().into_inner().bound;
        assert!(bound.is_empty(), "{bound:?}");
        let disk = tempfile::tempfile().unwrap();
        disk.set_len(1 << 20).unwrap();
        let device = DeviceConfig::Blk { disk: Fd(0), read_only: false, serial: "late".into() };
        vm.call(Request::Attach { slot: DISK_SLOT, device }, &[disk.as_fd()]).unwrap();
        let bound = agent.rescan(RescanRequest {}).await.unwrap().into_inner().bound;
        assert_eq!(bound, [format!("virtio-mmio.{DISK_SLOT}")]);
        let bound = agent.rescan(RescanRequest {}).await.unwrap().into_inner().bound;
        assert!(bound.is_empty(), "{bound:?}");
        agent.sync(SyncRequest {}).await.unwrap();
    });
}

#[test]
fn the_agent_starts_the_processors_that_the_machine_has() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let two = Options { spoil: Some(|config| config.vcpus = 2), ..Options::default() };
    let mut vm = TestVm::boot(&two).unwrap();
    let stream = vm.open_stream(AGENT_PORT, BOOT).unwrap();
    runtime.block_on(async { client(stream).await.hello(hello()).await.unwrap() });
    // The guest's kernel refuses when the processor does not answer.
    let console = vm.console_text();
    assert!(
        console.contains("processors started") && console.contains(r#""count":1"#),
        "{console}"
    );
}
