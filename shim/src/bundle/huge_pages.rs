//! Huge pages of the host's pool: how many a container asks for with `linux.resources.hugepageLimits`,
//! and whether the host has them (`docs/decisions/0033-huge-pages-of-the-pool.md`).
//!
//! Callers such as Kubernetes list every page size of the host, with a limit of 0 for those that are
//! not asked for.

use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use oci_spec::runtime::{
    LinuxHugepageLimit, LinuxHugepageLimitBuilder, LinuxResources, Mount, Spec,
};
use rustix::fs::statfs;
use thiserror::Error;

use super::refuse::{Refusal, refuse};
use super::{guest, id_map, unified};

/// The one page size that a machine has, as the kernel names it in cgroups.
const SIZE: &str = "2MB";
/// The size of a page, in MiB.
pub const HUGE_PAGE_MIB: u32 = 2;
const PAGE_BYTES: i64 = 2 << 20;
/// The host's pools, a directory for each page size.
const POOLS: &str = "/sys/kernel/mm/hugepages";
/// The host's pool of pages of [`SIZE`].
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
/// A file of cgroup v2 that limits pages of a size is named `hugetlb.`, the size, and this.
const FILE: (&str, &str) = ("hugetlb.", ".max");
/// What statfs(2) says of a hugetlbfs.
const MAGIC: i64 = 0x9584_58f6;
/// The guest's kernel describes plugged memory in blocks of so many MiB, with 1 MiB for so many.
const BLOCK_MIB: u64 = 128;
const DESCRIBED_BY_A_MIB: u64 = 64;

/// The host's pool has too few free pages.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "linux.resources.hugepageLimits needs {needed} huge pages of {SIZE}, and the host has {free} free; \
     add some: echo {enough} > {POOL}/nr_hugepages"
)]
pub struct Shortage {
    /// How many pages are needed.
    pub needed: u32,
    /// How many the pool has.
    pub free: u32,
    /// How large a pool would do.
    pub enough: u32,
}

/// The host's pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// All of its pages.
    pub pages: u32,
    /// Those that nobody has or has reserved, with those that the host's kernel may add by itself.
    pub free: u32,
}

impl Pool {
    /// The pool of this host.
    #[must_use]
    pub fn of_the_host() -> Self {
        Self::at(Path::new(POOL))
    }

    fn at(directory: &Path) -> Self {
        let read = |name: &str| {
            let text = fs::read_to_string(directory.join(name)).unwrap_or_default();
            text.trim().parse::<u32>().unwrap_or(0)
        };
        let more = read("nr_overcommit_hugepages").saturating_sub(read("surplus_hugepages"));
        let free = read("free_hugepages").saturating_sub(read("resv_hugepages"));
        Self { pages: read("nr_hugepages"), free: free.saturating_add(more) }
    }

    /// Checks that so many pages are free.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn check(self, needed: u32) -> Result<(), Shortage> {
        match needed.saturating_sub(self.free) {
            0 => Ok(()),
            missing => {
                let enough = self.pages.saturating_add(missing);
                Err(Shortage { needed, free: self.free, enough })
            }
        }
    }
}

/// How many pages a limit allows; like the kernel, it counts whole ones.
#[must_use]
pub fn pages(resources: &LinuxResources) -> u32 {
    let limits = resources.hugepage_limits().iter().flatten();
    let limit =
        limits.filter(|it| it.page_size() == SIZE).map(LinuxHugepageLimit::limit).next_back();
    u32::try_from(limit.unwrap_or(0).max(0) / PAGE_BYTES).unwrap_or(u32::MAX)
}

/// What the guest's kernel needs to describe memory of so many pages, in MiB.
#[must_use]
pub fn overhead_mib(pages: u32) -> u64 {
    match u64::from(pages) * u64::from(HUGE_PAGE_MIB) {
        0 => 0,
        // One block for what is spare beside them, and for a block that is not full.
        mib => (mib.div_ceil(BLOCK_MIB) + 1) * (BLOCK_MIB / DESCRIBED_BY_A_MIB),
    }
}

/// Checks that the host has these page sizes, and a machine those of which there is more than 0.
///
/// # Errors
/// Names the size.
pub fn check(resources: &LinuxResources) -> Result<(), Refusal> {
    check_among(resources, &sizes(Path::new(POOLS)))
}

fn check_among(resources: &LinuxResources, sizes: &[String]) -> Result<(), Refusal> {
    for limit in resources.hugepage_limits().iter().flatten() {
        let size = limit.page_size();
        if !sizes.contains(size) {
            return Err(refuse(
                format!(
                    "linux.resources.hugepageLimits: the host has no huge pages of {size:?}, but of \
                     {sizes:?}"
                ),
                "name one of those",
            ));
        }
        if size != SIZE && limit.limit() > 0 {
            return Err(refuse(
                format!("linux.resources.hugepageLimits: a machine has no huge pages of {size}"),
                "ask for as many bytes in pages of 2MB",
            ));
        }
    }
    Ok(())
}

/// The page sizes of a host, as the kernel names them in cgroups.
fn sizes(pools: &Path) -> Vec<String> {
    let pools = fs::read_dir(pools).into_iter().flatten().flatten();
    let kib = pools.filter_map(|pool| {
        let name = pool.file_name().into_string().ok()?;
        name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()
    });
    let mut kib: Vec<_> = kib.collect();
    kib.sort_unstable();
    let name = |kib: u64| match kib {
        0..0x400 => format!("{kib}KB"),
        0x400..0x10_0000 => format!("{}MB", kib >> 10),
        _ => format!("{}GB", kib >> 20),
    };
    kib.into_iter().map(name).collect()
}

/// Moves limits from files of cgroup v2 to the field. No limit stays in the file.
pub(super) fn fold(resources: &mut LinuxResources, files: &mut HashMap<String, String>) {
    let names = files.keys().filter_map(|file| {
        let size = file.strip_prefix(FILE.0)?.strip_suffix(FILE.1)?;
        (!size.contains('.')).then(|| (file.clone(), size.to_owned()))
    });
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    for (file, size) in names {
        let limit = files.get(&file).and_then(|text| unified::bytes(text)).filter(|it| *it >= 0);
        if let Some(limit) = limit {
            files.remove(&file);
            set(resources, &size, limit);
        }
    }
}

/// Replaces limits by those of an update.
pub(super) fn merge(current: &mut LinuxResources, update: &LinuxResources) {
    for limit in update.hugepage_limits().iter().flatten() {
        set(current, limit.page_size(), limit.limit());
    }
}

/// Sets the limits of a pod: for each page size the sum of its containers' limits. A container
/// without one gets none, and takes nothing from the others.
pub(super) fn add_up(total: &mut LinuxResources, all: &[&LinuxResources]) {
    total.set_hugepage_limits(None);
    for limit in all.iter().flat_map(|it| it.hugepage_limits().iter().flatten()) {
        let mut sums = total.hugepage_limits().iter().flatten();
        let sum = sums.find(|sum| sum.page_size() == limit.page_size());
        let sum = sum.map_or(0, LinuxHugepageLimit::limit).saturating_add(limit.limit());
        set(total, limit.page_size(), sum);
    }
}

/// Raises a limit to so many pages, which the machine of a pod has already.
pub fn allow(resources: &mut LinuxResources, count: u32) {
    if count > pages(resources) {
        set(resources, SIZE, i64::from(count) * PAGE_BYTES);
    }
}

/// Leaves the guest the limit of the pages that it has.
pub(super) fn for_guest(resources: &mut LinuxResources) {
    if let Some(limits) = resources.hugepage_limits_mut() {
        limits.retain(|limit| limit.page_size() == SIZE);
    }
}

fn set(resources: &mut LinuxResources, size: &str, limit: i64) {
    let others = resources.hugepage_limits().iter().flatten().filter(|it| it.page_size() != size);
    let new = LinuxHugepageLimitBuilder::default().page_size(size).limit(limit).build();
    let limits: Vec<_> = others.cloned().chain(new).collect();
    resources.set_hugepage_limits(Some(limits));
}

/// Makes a bind mount of a directory in a hugetlbfs a hugetlbfs of the guest, with the same page size,
/// owner and mode; returns whether it was one. Files of one cannot be shared: to write them is to map
/// them.
///
/// # Errors
/// The container has a user namespace, in which the kernel mounts none.
pub(super) fn replace_bind(
    mount: &mut Mount,
    (source, metadata): (&Path, &Metadata),
    spec: &Spec,
) -> Result<bool, Refusal> {
    let Ok(found) = statfs(source) else { return Ok(false) };
    if !metadata.is_dir() || found.f_type != MAGIC {
        return Ok(false);
    }
    if id_map::has_user_namespace(spec) {
        let at = mount.destination().display();
        return Err(refuse(
            format!("mounts: {at} is a hugetlbfs, which cannot be mounted in a user namespace"),
            "leave the mount out and use MAP_HUGETLB, or leave the user namespace out",
        ));
    }
    let own = [
        format!("pagesize={}", found.f_bsize),
        // hugetlbfs knows no set-id bits here.
        format!("mode={:o}", metadata.mode() & 0o1777),
        format!("uid={}", metadata.uid()),
        format!("gid={}", metadata.gid()),
    ];
    let options = guest::options_of_any_type(mount).chain(own).collect();
    mount
        .set_typ(Some("hugetlbfs".to_owned()))
        .set_source(Some("hugetlbfs".into()))
        .set_options(Some(options));
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn resources(limits: &Value) -> LinuxResources {
        serde_json::from_value(json!({"hugepageLimits": limits})).unwrap()
    }

    fn json(resources: &LinuxResources) -> Value {
        serde_json::to_value(resources).unwrap()["hugepageLimits"].take()
    }

    #[test]
    fn whole_pages_of_the_size_of_a_machine_are_counted() {
        let of = |size: &str, limit: i64| {
            pages(&resources(&json!([{"pageSize": size, "limit": limit}])))
        };
        assert_eq!(of("2MB", 64 << 20), 32);
        assert_eq!(of("2MB", (4 << 20) + 5), 2);
        assert_eq!((of("2MB", 0), of("2MB", -1), of("1GB", 1 << 30)), (0, 0, 0));
        assert_eq!(of("2MB", i64::MAX), u32::MAX);
        assert_eq!(pages(&LinuxResources::default()), 0);
        assert_eq!((overhead_mib(0), overhead_mib(1), overhead_mib(64)), (0, 4, 4));
    }

    #[test]
    fn sizes_of_the_host_are_taken_and_those_that_a_machine_has_not_only_with_nothing() {
        let pools = tempfile::tempdir().unwrap();
        for name in ["hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "other"] {
            fs::create_dir(pools.path().join(name)).unwrap();
        }
        let sizes = sizes(pools.path());
        assert_eq!(sizes, ["64KB", "2MB", "1GB"]);
        let checked = |size: &str, limit: i64| {
            let limits = resources(&json!([{"pageSize": size, "limit": limit}]));
            check_among(&limits, &sizes).map_err(|refusal| refusal.to_string())
        };
        assert_eq!(checked("2MB", 4 << 20), Ok(()));
        assert_eq!(checked("1GB", 0), Ok(()));
        let words = checked("1GB", 1 << 30).unwrap_err();
        assert!(words.contains("no huge pages of 1GB; ask for"), "{words}");
        let words = checked("3MB", 0).unwrap_err();
        assert!(words.contains(r#"no huge pages of "3MB""#) && words.contains("1GB"), "{words}");
    }

    #[test]
    fn a_pool_with_too_few_pages_is_named_with_the_way_out() {
        let pool = tempfile::tempdir().unwrap();
        for (file, value) in [
            ("nr_hugepages", "10\n"),
            ("free_hugepages", "9\n"),
            ("resv_hugepages", "4\n"),
            ("nr_overcommit_hugepages", "3\n"),
            ("surplus_hugepages", "2\n"),
        ] {
            fs::write(pool.path().join(file), value).unwrap();
        }
        let found = Pool::at(pool.path());
        assert_eq!(found, Pool { pages: 10, free: 6 });
        assert_eq!(found.check(6), Ok(()));
        let words = found.check(8).unwrap_err().to_string();
        assert!(words.contains("needs 8 huge pages of 2MB, and the host has 6 free"), "{words}");
        assert!(
            words.ends_with("echo 12 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
        );
        let nothing = Pool::at(Path::new("/nonexistent"));
        assert_eq!(nothing, Pool { pages: 0, free: 0 });
    }

    #[test]
    fn the_limits_of_a_pod_are_sums() {
        let one = resources(&json!([
            {"pageSize": "2MB", "limit": 4 << 20}, {"pageSize": "1GB", "limit": 0},
        ]));
        let other = resources(&json!([{"pageSize": "2MB", "limit": 2 << 20}]));
        let mut total = one.clone();
        add_up(&mut total, &[&one, &LinuxResources::default(), &other]);
        assert_eq!(pages(&total), 3);
        assert_eq!(json(&total).as_array().unwrap().len(), 2);
        allow(&mut total, 2);
        assert_eq!(pages(&total), 3);
        allow(&mut total, 9);
        assert_eq!(pages(&total), 9);
        for_guest(&mut total);
        assert_eq!(json(&total), json!([{"pageSize": "2MB", "limit": 18 << 20}]));
        let mut none = LinuxResources::default();
        add_up(&mut none, &[&LinuxResources::default(), &LinuxResources::default()]);
        allow(&mut none, 0);
        assert_eq!(json(&none), Value::Null);
    }

    #[test]
    fn files_are_limits_too() {
        let mut all = resources(&json!([{"pageSize": "2MB", "limit": 1}]));
        let files = [
            ("hugetlb.2MB.max", "4M"),
            ("hugetlb.1GB.max", "max"),
            ("hugetlb.2MB.rsvd.max", "0"),
            ("memory.max", "1"),
        ];
        let mut files: HashMap<_, _> =
            files.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        fold(&mut all, &mut files);
        assert_eq!(json(&all), json!([{"pageSize": "2MB", "limit": 4 << 20}]));
        assert_eq!(files.len(), 3);
    }

    #[test]
    fn a_directory_that_is_no_hugetlbfs_stays_a_bind_mount() {
        let mut mount = Mount::default();
        mount.set_typ(Some("bind".to_owned()));
        let directory = Path::new("/");
        let metadata = fs::metadata(directory).unwrap();
        let found = (directory, &metadata);
        assert_eq!(replace_bind(&mut mount, found, &Spec::default()), Ok(false));
        assert_eq!(mount.typ().as_deref(), Some("bind"));
    }
}
