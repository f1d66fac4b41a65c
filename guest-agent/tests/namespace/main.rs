//! The agent as PID 1 of a PID namespace, with a host that dials it over the vsock loopback.
//!
//! Needs root, cgroup v2 with its controllers free, and a kernel with vsock loopback: all of which
//! the test host has. Only what a virtual machine alone can show is left to the end-to-end suite.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod containers;
mod exec;
mod guest;
mod streams;

use std::collections::HashMap;

use bulkhead_protocol::VERSION;
use bulkhead_protocol::agent::{HelloRequest, RescanRequest, SyncRequest};
use guest::Guest;
use tonic::Code;

#[test]
#[ignore = "needs the test host"]
fn hello_with_another_version_is_refused_and_names_both() {
    Guest::run(async |mut guest| {
        let request = HelloRequest { version: VERSION + 1, ..HelloRequest::default() };
        let status = guest.agent.hello(request).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition);
        let words = format!(
            "host speaks version {} of the protocol, this guest version {VERSION}",
            VERSION + 1
        );
        assert_eq!(status.message(), words);
    });
}

#[test]
#[ignore = "needs the test host"]
fn hello_seeds_the_generator_and_names_the_guest() {
    Guest::run(async |mut guest| {
        let request = HelloRequest {
            version: VERSION,
            time_ns: 0,
            entropy: vec![7; 64],
            hostname: "pod-1".to_owned(),
            sysctls: HashMap::from([("net.core.somaxconn".to_owned(), "4097".to_owned())]),
            // A setting of the host that this kernel lacks is left out.
            settings: [("net.core.somaxconn", "1"), ("vm.no_such", "1")]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
        };
        let reply = guest.agent.hello(request).await.unwrap().into_inner();
        assert_eq!(reply.version, VERSION);
        assert!(!reply.kernel_release.is_empty());
        let set = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        assert_eq!(set.trim(), "4097");
        let unknown = HelloRequest {
            version: VERSION,
            sysctls: HashMap::from([("net.no_such".to_owned(), "1".to_owned())]),
            ..HelloRequest::default()
        };
        let status = guest.agent.hello(unknown).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with("linux.sysctl: net/no_such: "), "{status}");
        let too_much =
            HelloRequest { version: VERSION, entropy: vec![7; 65], ..HelloRequest::default() };
        let status = guest.agent.hello(too_much).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    });
}

#[test]
#[ignore = "needs the test host"]
fn sync_and_rescan_answer() {
    Guest::run(async |mut guest| {
        guest.agent.sync(SyncRequest {}).await.unwrap();
        // The test host has no virtio-mmio slots.
        let bound = guest.agent.rescan(RescanRequest {}).await.unwrap().into_inner().bound;
        assert!(bound.is_empty(), "{bound:?}");
    });
}
