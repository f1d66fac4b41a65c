//! Settings of the host's kernel that a guest takes over when it starts (sysctl(8)).
//!
//! What has no namespace is the host's in a container of runc, and programs look at it. The guest's
//! kernel would derive much of it from the little memory that a machine starts with.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Where a kernel has its settings.
const SETTINGS: &str = "/proc/sys";
/// What is taken over, by the names in sysctl(8).
const FOLLOWED: [&str; 63] = [
    // How many tasks, files and watches there may be. Each of these is derived from memory at boot.
    "kernel.threads-max",
    "kernel.pid_max",
    "fs.file-max",
    "fs.nr_open",
    "fs.epoll.max_user_watches",
    "fs.fanotify.max_queued_events",
    "fs.fanotify.max_user_groups",
    "fs.fanotify.max_user_marks",
    "fs.inotify.max_queued_events",
    "fs.inotify.max_user_instances",
    "fs.inotify.max_user_watches",
    "user.max_cgroup_namespaces",
    "user.max_fanotify_groups",
    "user.max_fanotify_marks",
    "user.max_inotify_instances",
    "user.max_inotify_watches",
    "user.max_ipc_namespaces",
    "user.max_mnt_namespaces",
    "user.max_net_namespaces",
    "user.max_pid_namespaces",
    "user.max_time_namespaces",
    "user.max_user_namespaces",
    "user.max_uts_namespaces",
    // Databases and proxies size their queues by these.
    "fs.aio-max-nr",
    "fs.mount-max",
    "fs.pipe-max-size",
    "fs.pipe-user-pages-hard",
    "fs.pipe-user-pages-soft",
    // Address space: search engines and databases refuse to start with too few mappings.
    "vm.max_map_count",
    "vm.overcommit_memory",
    "vm.swappiness",
    "vm.vfs_cache_pressure",
    "vm.legacy_va_layout",
    "vm.mmap_min_addr",
    "kernel.randomize_va_space",
    // What a process of another user may do or see: runtimes of languages and sandboxes ask.
    "fs.protected_fifos",
    "fs.protected_hardlinks",
    "fs.protected_regular",
    "fs.protected_symlinks",
    "fs.suid_dumpable",
    "kernel.dmesg_restrict",
    "kernel.io_uring_disabled",
    "kernel.keys.maxbytes",
    "kernel.keys.maxkeys",
    "kernel.kptr_restrict",
    "kernel.perf_event_paranoid",
    "kernel.unprivileged_bpf_disabled",
    "kernel.unprivileged_userns_clone",
    "kernel.yama.ptrace_scope",
    "vm.unprivileged_userfaultfd",
    // Where core dumps go. A pattern that runs a program of the host is left out.
    "kernel.core_pattern",
    "kernel.core_uses_pid",
    // Buffers of sockets: of all networks together, or what a new network starts with.
    "net.core.netdev_max_backlog",
    "net.core.optmem_max",
    "net.core.rmem_default",
    "net.core.rmem_max",
    "net.core.wmem_default",
    "net.core.wmem_max",
    "net.ipv4.tcp_congestion_control",
    "net.ipv4.tcp_mem",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "net.ipv4.udp_mem",
];
/// The memory that may be committed where overcommit is refused. The host may have a ratio of its
/// memory instead, which would be one of the guest's.
const COMMIT: &str = "vm.overcommit_kbytes";
/// That amount on the host, in `/proc/meminfo`.
const COMMIT_LIMIT: &str = "CommitLimit:";
/// The memory by which the guest's kernel judges a single reservation, by a patch of ours: the
/// host's, as if the container ran there.
const GUESS: &str = "vm.overcommit_guess_kbytes";

/// The settings of this host.
pub(crate) fn of_host() -> BTreeMap<String, String> {
    let mut settings = read(Path::new(SETTINGS));
    let info = rustix::system::sysinfo();
    let units = u128::from(info.totalram) + u128::from(info.totalswap);
    let kilobytes = (units * u128::from(info.mem_unit)) >> 10;
    settings.insert(GUESS.to_owned(), kilobytes.to_string());
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    settings.extend(commit_limit(&meminfo).map(|limit| (COMMIT.to_owned(), limit)));
    settings
}

/// The settings below a directory; those that its kernel lacks are left out.
fn read(directory: &Path) -> BTreeMap<String, String> {
    let value = |name: &str| {
        let text = fs::read_to_string(directory.join(name.replace('.', "/"))).ok()?;
        let value = text.trim();
        let usable = !value.is_empty() && !value.starts_with('|');
        usable.then(|| (name.to_owned(), value.to_owned()))
    };
    FOLLOWED.iter().filter_map(|name| value(name)).collect()
}

/// The memory that the host may commit, in KiB.
fn commit_limit(meminfo: &str) -> Option<String> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(COMMIT_LIMIT))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> BTreeMap<String, String> {
        let directory = tempfile::tempdir().unwrap();
        for (name, value) in files {
            let file = directory.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, value).unwrap();
        }
        read(directory.path())
    }

    #[test]
    fn a_setting_is_taken_over_unless_the_kernel_lacks_it() {
        let found = host(&[("vm/max_map_count", "262144\n"), ("net/ipv4/tcp_mem", "1\t2\t3\n")]);
        let expected = [("net.ipv4.tcp_mem", "1\t2\t3"), ("vm.max_map_count", "262144")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(found, expected.into());
    }

    #[test]
    fn a_program_of_the_host_gets_no_core_dumps() {
        assert!(host(&[("kernel/core_pattern", "|/lib/systemd/systemd-coredump %P\n")]).is_empty());
        let plain = host(&[("kernel/core_pattern", "/cores/%p\n")]);
        assert_eq!(plain["kernel.core_pattern"], "/cores/%p");
    }

    #[test]
    fn what_the_host_may_commit_is_an_amount() {
        let meminfo = "Bounce: 0 kB\nCommitLimit:     4081332 kB\nCommitted_AS:    1 kB\n";
        assert_eq!(commit_limit(meminfo).as_deref(), Some("4081332"));
        assert_eq!(commit_limit("CommitLimit: many kB\n"), None);
    }

    #[test]
    fn this_hosts_memory_judges_reservations() {
        let guess = of_host()[GUESS].parse::<u64>().unwrap();
        let total = rustix::system::sysinfo();
        assert!(guess >= total.totalram * u64::from(total.mem_unit) / 1024);
    }
}
