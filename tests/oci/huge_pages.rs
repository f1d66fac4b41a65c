//! Huge pages of the host's pool: `hugepageLimits`, `MAP_HUGETLB` and hugetlbfs, beside runc.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bulkhead_tests::bundle::{Bundle, bind};
use bulkhead_tests::netns;
use bulkhead_tests::runtime::{Runtime, comes_true, kill_9, message, told};
use serde_json::{Value, json};

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const PAGES: u64 = 64;
const PAGE: u64 = 2 << 20;

fn pool(file: &str) -> u64 {
    fs::read_to_string(format!("{POOL}/{file}")).unwrap().trim().parse().unwrap()
}

/// Pages of the pool that nobody has touched, and those of them that are reserved.
fn free() -> (u64, u64) {
    (pool("free_hugepages"), pool("resv_hugepages"))
}

/// Waits until all pages are back in the pool.
fn assert_whole() {
    assert!(comes_true(Duration::from_secs(10), || free() == (PAGES, 0)), "{:?}", free());
}

fn make_pool() {
    fs::write(format!("{POOL}/nr_hugepages"), PAGES.to_string()).unwrap();
    assert_eq!(pool("nr_hugepages"), PAGES);
    assert_whole();
}

fn limits(pages: u64) -> Value {
    json!([{"pageSize": "2MB", "limit": pages * PAGE}])
}

/// A container that sleeps, has the host's Python, and so many pages.
fn sleeping(pages: Option<u64>) -> Bundle {
    let bundle = Bundle::script("exec sleep 1000").unwrap().with_usr_of_the_host().unwrap();
    bundle
        .with(|spec| spec["linux"]["resources"]["hugepageLimits"] = json!(pages.map(limits)))
        .unwrap()
}

fn start(runtime: &Runtime, id: &str, bundle: &Bundle) {
    runtime.create(id, bundle).unwrap();
    runtime.ok(&["start", id]).unwrap();
}

/// Runs Python in a container, where `take` maps pages and touches them; returns what it prints.
fn python(runtime: &Runtime, id: &str, program: &str) -> String {
    const TAKE: &str = "
import mmap, os, time
def take(pages, file=-1):
    flags = mmap.MAP_SHARED if file >= 0 else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000
    try:
        taken = mmap.mmap(file, pages << 21, flags)
    except OSError as error:
        return os.strerror(error.errno)
    for page in range(pages):
        taken[page << 21] = 1
    return taken
def names(pages):
    return pages if isinstance(pages, str) else 'taken'
";
    let program = format!("{TAKE}{program}");
    runtime.ok(&["exec", id, "/usr/bin/python3", "-c", &program]).unwrap().trim().to_owned()
}

/// A directory of the host that is a hugetlbfs, until it is dropped.
struct Hugetlbfs(tempfile::TempDir);

impl Hugetlbfs {
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs"]).arg(directory.path());
        assert!(mount.status().unwrap().success());
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Hugetlbfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.path()).status();
    }
}

#[test]
fn pages_are_mapped_as_under_runc_and_go_back_to_the_pool() {
    make_pool();
    let host = Hugetlbfs::mount();
    let volume = host.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o1770)).unwrap();
    chown(&volume, Some(5), Some(7)).unwrap();
    let found = [Runtime::new().unwrap(), Runtime::runc().unwrap()].map(|runtime| {
        let own = json!({"destination": "/dev/hugepages", "type": "hugetlbfs", "source": "nodev",
            "options": ["nosuid", "pagesize=2M"]});
        let bundle = sleeping(Some(16)).mount(own).unwrap();
        let bundle = bundle.mount(bind(&volume, "/volume", &["rprivate", "rw"])).unwrap();
        start(&runtime, "c", &bundle);
        let see = "
print(names(take(16)))
for place in '/dev/hugepages', '/volume':
    found, own = os.statvfs(place), os.stat(place)
    print(place, found.f_bsize, oct(own.st_mode), own.st_uid, own.st_gid)
    file = os.open(place + '/file', os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 3 << 21)
    print(names(take(3, file)))
    os.remove(place + '/file')
print(open('/sys/fs/cgroup/hugetlb.2MB.max').read())
";
        let seen = python(&runtime, "c", see);
        // What only a machine of its own has.
        if !runtime.is_runc() {
            let all = python(&runtime, "c", "print(names(take(17)), names(take(16)))");
            assert_eq!(all, "Cannot allocate memory taken");
            let meminfo = runtime.ok(&["exec", "c", "cat", "/proc/meminfo"]).unwrap();
            let line = meminfo.lines().find(|line| line.starts_with("HugePages_Total"));
            assert_eq!(line.unwrap().split_whitespace().last(), Some("16"));
            assert_eq!(free().0, PAGES - 16, "{:?}", free());
        }
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert_whole();
        runtime.assert_clean().unwrap();
        seen
    });
    assert_eq!(found[0], found[1]);
    assert!(found[0].contains("/volume 2097152 0o41770 5 7\ntaken"), "{}", found[0]);
}

#[test]
fn what_the_host_does_not_have_is_refused_before_anything_starts() {
    make_pool();
    let refused = |runtime: &Runtime, limits: Value| {
        let bundle = Bundle::script("true").unwrap();
        let bundle = bundle.with(|spec| spec["linux"]["resources"]["hugepageLimits"] = limits);
        let told = told(&runtime.run("c", &bundle.unwrap()).unwrap());
        runtime.assert_clean().unwrap();
        (told.0, message(&told.2))
    };
    let ours = Runtime::new().unwrap();
    let (status, words) = refused(&ours, limits(PAGES + 1));
    assert_eq!(status, Some(1), "{words}");
    let expected = "needs 65 huge pages of 2MB, and the host has 64 free; add some: echo 65 > ";
    assert!(words.contains(expected) && words.contains(POOL), "{words}");
    for runtime in [&ours, &Runtime::runc().unwrap()] {
        let (status, words) = refused(runtime, json!([{"pageSize": "3MB", "limit": 0}]));
        assert_eq!(status, Some(1), "{words}");
        assert!(words.contains("3MB"), "{words}");
    }
    let host = Hugetlbfs::mount();
    let bundle = Bundle::script("true").unwrap().mount(bind(host.path(), "/huge", &[])).unwrap();
    let bundle = bundle.with(|spec| {
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    });
    let told = told(&ours.run("c", &bundle.unwrap()).unwrap());
    assert!(told.2.contains("/huge is a hugetlbfs, which cannot be mounted in a user"), "{told:?}");
    ours.assert_clean().unwrap();
    assert_whole();
}

#[test]
fn later_containers_and_updates_add_theirs_and_a_killed_monitor_keeps_none() {
    make_pool();
    let runtime = Runtime::new().unwrap();
    let first = sleeping(None);
    start(&runtime, "a", &first);
    assert_eq!(python(&runtime, "a", "print(names(take(1)))"), "Cannot allocate memory");
    let pid = runtime.state("a").unwrap()["pid"].as_u64().unwrap();
    let network = format!("/proc/{pid}/ns/net");
    let second = netns::join(sleeping(Some(8)), &network).unwrap();
    start(&runtime, "b", &second);
    assert_eq!(python(&runtime, "b", "print(names(take(8)))"), "taken");
    // The same limit by the name of cgroup v2's file, as Podman's --cgroup-conf gives it.
    let file = json!({"hugetlb.2MB.max": "114M"});
    let third = sleeping(None).with(|spec| spec["linux"]["resources"]["unified"] = file).unwrap();
    let third = netns::join(third, &network).unwrap();
    let words = runtime.create("c", &third).unwrap_err().to_string();
    assert!(words.contains("needs 57 huge pages of 2MB, and the host has 56 free"), "{words}");
    let _ = runtime.call(&["delete", "--force", "c"]);

    let change = first.path().join("change.json");
    fs::write(&change, json!({"hugepageLimits": limits(12)}).to_string()).unwrap();
    runtime.ok(&["update", "-r", change.to_str().unwrap(), "b"]).unwrap();
    let seen = "print(names(take(12)), open('/sys/fs/cgroup/hugetlb.2MB.max').read())";
    assert_eq!(python(&runtime, "b", seen), format!("taken {}", 12 * PAGE));
    // Both containers are limits of one pool.
    assert_eq!(python(&runtime, "a", "print(names(take(13)))"), "Cannot allocate memory");
    let [monitor] = runtime.processes("bulkhead-vmm").unwrap()[..] else { panic!("one monitor") };
    let cgroup = fs::read_to_string(format!("/proc/{monitor}/cgroup")).unwrap();
    let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::")).unwrap().trim();
    let limit = fs::read_to_string(format!("/sys/fs/cgroup{cgroup}/hugetlb.2MB.max")).unwrap();
    assert_eq!(limit.trim(), (12 * PAGE).to_string());
    let (untouched, reserved) = free();
    assert_eq!(untouched - reserved, PAGES - 12);

    kill_9(monitor).unwrap();
    assert_whole();
    for id in ["b", "a"] {
        runtime.ok(&["delete", "--force", id]).unwrap();
    }
    runtime.assert_clean().unwrap();
}

#[test]
#[ignore = "long: --suite oci_long"]
fn no_process_that_is_killed_keeps_a_page() {
    make_pool();
    for name in ["bulkhead-fs", " supervise", "bulkhead-stand-in"] {
        let runtime = Runtime::new().unwrap();
        let bundle = sleeping(Some(4));
        start(&runtime, "c", &bundle);
        let (untouched, reserved) = free();
        assert_eq!(untouched - reserved, PAGES - 4);
        let [process] = runtime.processes(name).unwrap()[..] else { panic!("one {name}") };
        kill_9(process).unwrap();
        runtime.ok(&["delete", "--force", "c"]).unwrap();
        assert_whole();
        runtime.assert_clean().unwrap();
    }
}
