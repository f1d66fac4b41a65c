//! The agent as PID 1 of a machine, called over the monitor's vsock. Tests that need no machine are
//! in the agent's own package.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bulkhead_protocol::agent::agent_client::AgentClient;
use bulkhead_protocol::agent::{HelloRequest, RescanRequest, StartProcessorsRequest, SyncRequest};
use bulkhead_protocol::{AGENT_PORT, VERSION};
use bulkhead_tests::runtime::comes_true;
use bulkhead_tests::vm::{Options, TestVm};
use bulkhead_vmm::config::{DeviceConfig, Fd, VmConfig};
use bulkhead_vmm::control::Request;
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};

pub(crate) const BOOT: Duration = Duration::from_secs(60);
/// The slot of the disk that is attached late; Linux gives its platform device the same number.
const DISK_SLOT: u8 = 9;

/// A client on a stream that the monitor opened. The stream, and so the channel, can be used only
/// once.
pub(crate) async fn client(stream: UnixStream) -> AgentClient<Channel> {
    stream.set_nonblocking(true).unwrap();
    let mut stream = Some(tokio::net::UnixStream::from_std(stream).unwrap());
    let connector = tower::service_fn(move |_| {
        let stream = stream.take().ok_or_else(|| std::io::Error::other("the stream was used"));
        async move { stream.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://agent");
    AgentClient::new(endpoint.connect_with_connector(connector).await.unwrap())
}

pub(crate) fn hello() -> HelloRequest {
    HelloRequest {
        version: VERSION,
        time_ns: 1_700_000_000_000_000_000,
        entropy: vec![1; 64],
        hostname: "pod".to_owned(),
        ..HelloRequest::default()
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
fn processors_that_were_declared_exist_and_start_when_they_are_wanted() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let spoil = |config: &mut VmConfig| (config.vcpus, config.vcpus_max) = (2, 4);
    let mut vm = TestVm::boot(&Options { spoil: Some(spoil), ..Options::default() }).unwrap();
    let stream = vm.open_stream(AGENT_PORT, BOOT).unwrap();
    runtime.block_on(async {
        let mut agent = client(stream).await;
        agent.hello(hello()).await.unwrap();
        // Both processors must answer, or the guest's kernel refuses.
        agent.start_processors(StartProcessorsRequest { count: 2 }).await.unwrap();
        for (count, threads) in [(1, 2), (2, 2), (4, 4), (3, 4)] {
            vm.call(Request::Processors { count }, &[]).unwrap();
            // A thread sets its name some time after it has started.
            comes_true(BOOT, || processors(&vm) >= threads);
            assert_eq!(processors(&vm), threads);
        }
        agent.start_processors(StartProcessorsRequest { count: 4 }).await.unwrap();
        agent.start_processors(StartProcessorsRequest { count: 3 }).await.unwrap();
        vm.call(Request::Pause, &[]).unwrap();
        vm.call(Request::Resume, &[]).unwrap();
        agent.sync(SyncRequest {}).await.unwrap();
        let status = agent.start_processors(StartProcessorsRequest { count: 5 }).await.unwrap_err();
        assert!(status.message().contains("cpu4"), "{status}");
    });
    let refused = vm.call(Request::Processors { count: 5 }, &[]).unwrap_err();
    assert!(format!("{refused:#}").contains("for 4 at most"), "{refused:#}");
    let console = vm.console_text();
    let started = |count: u32| console.matches(&format!(r#""count":{count}"#)).count();
    assert_eq!((started(1), started(2), started(0)), (1, 1, 1), "{console}");
}

/// The monitor's threads that run processors.
fn processors(vm: &TestVm) -> usize {
    vm.threads().unwrap().iter().filter(|name| name.starts_with("vcpu")).count()
}
