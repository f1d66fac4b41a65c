//! Tests of a pod without containers, in a real machine.

use std::path::Path;
use std::time::Duration;

use tokio::runtime::Builder;

use super::*;
use crate::network::namespace::Network;
use crate::policy::Policy;

#[test]
#[ignore = "needs the test host"]
fn a_pod_lives_and_ends_without_a_container() {
    let root = tempfile::tempdir().unwrap();
    let home = Home::claim(root.path(), &"p".parse().unwrap(), Path::new("/")).unwrap();
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/dist/bin");
    let policy = Policy::default();
    let assets = Assets::find_beside(&dist, &policy.guest, |_| None).unwrap();
    let size = MachineSize { vcpus: 1, memory_mib: 256, expected_mib: 256, huge_pages: 0 };
    let plan = PodPlan {
        hostname: "pod".to_owned(),
        size,
        most: size,
        sysctls: [("net.core.somaxconn".to_owned(), "4097".to_owned())].into(),
        boot_timeout: policy.guest.boot_timeout,
        frames: policy.network,
        sockets: true,
        queue_pairs: 1,
        network: Network::New,
        resolv_conf: None,
    };
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let pod = Pod::start(&home, &plan, (assets, kvm::open().unwrap())).await.unwrap();
        let processes = pod.processes();
        assert!(processes.iter().all(|process| process.is_alive()));
        assert_eq!(pod.take_share_dir().unwrap(), ShareDir::default());
        pod.agent.sync().await.unwrap();
        pod.end().await;
        assert!(processes.iter().all(|process| process.wait(Duration::from_secs(10))));
        let assets = Assets::find_beside(&dist, &policy.guest, |_| None).unwrap();
        let unknown =
            PodPlan { sysctls: [("net.no_such".to_owned(), "1".to_owned())].into(), ..plan };
        let error = Pod::start(&home, &unknown, (assets, kvm::open().unwrap())).await.unwrap_err();
        assert!(error.to_string().contains("net/no_such"), "{error}");
    });
}
