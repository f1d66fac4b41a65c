//! A further process of a container with a user namespace joins that namespace, beside runc.

use std::fs;
use std::os::unix::fs::MetadataExt;

use bulkhead_tests::bundle::Bundle;
use bulkhead_tests::runtime::{Runtime, told};

use super::mounts::mapped;

/// Prints a process's IDs and capabilities, compares its namespaces with init's, and tries what
/// needs capabilities.
const PROBE: &str = "id -u; id -g; id -G; cat /proc/self/uid_map; \
    for name in user pid mnt ipc uts; do \
        test $(readlink /proc/self/ns/$name) = $(readlink /proc/1/ns/$name); echo $name $?; done; \
    grep ^Cap /proc/self/status; touch /mnt/$(id -u); stat -c '%n %u %g' /mnt/*; \
    hostname other; echo hostname $?; mount -t tmpfs none /tmp; echo mount $?; \
    mknod /mnt/null c 1 3; echo mknod $?; echo 1 > /proc/sys/kernel/sysrq; echo sysrq $?";

fn bundle() -> Bundle {
    let bundle = mapped(Bundle::new(&["/bin/sleep", "1000"]).unwrap());
    let bundle = bundle.with_capability("CAP_SYS_ADMIN").unwrap();
    fs::set_permissions(
        bundle.rootfs().join("mnt"),
        std::os::unix::fs::PermissionsExt::from_mode(0o1777),
    )
    .unwrap();
    bundle
}

/// The owners, on the host, of the files that were made in `/mnt`.
fn owners(bundle: &Bundle) -> Vec<(String, u32, u32)> {
    let entries = fs::read_dir(bundle.rootfs().join("mnt")).unwrap();
    let mut owners: Vec<_> = entries
        .map(|entry| {
            let entry = entry.unwrap();
            let data = entry.metadata().unwrap();
            (entry.file_name().into_string().unwrap(), data.uid(), data.gid())
        })
        .collect();
    owners.sort();
    owners
}

#[test]
fn a_further_process_is_in_the_containers_user_namespace() {
    let [ours, theirs] = [Runtime::new().unwrap(), Runtime::runc().unwrap()].map(|runtime| {
        let bundle = bundle();
        runtime.create("mapped", &bundle).unwrap();
        runtime.ok(&["start", "mapped"]).unwrap();
        let told = ["0:0", "7:8"].map(|user| {
            let exec = ["exec", "--user", user, "mapped", "/bin/sh", "-c", PROBE];
            told(&runtime.call(&exec).unwrap())
        });
        runtime.ok(&["delete", "--force", "mapped"]).unwrap();
        runtime.assert_clean().unwrap();
        (told, owners(&bundle))
    });
    assert_eq!(ours, theirs);
    assert!(ours.0[0].1.contains("user 0\n"), "{ours:?}");
    assert_eq!(ours.1, [("0".to_owned(), 100_000, 100_000), ("7".to_owned(), 100_007, 100_008)]);
}
