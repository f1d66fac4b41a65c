//! How much swap containers may use, computed from their limits.

use oci_spec::runtime::LinuxResources;

use super::size::mib;

/// The swap that these containers may use together, in MiB, on a host with `host_mib` of it.
///
/// Only a container with a memory limit counts: one without may use what the machine can become, and
/// the host swaps the machine. As in runc with cgroup v2, a limit of memory and swap that is not
/// given is no limit.
#[must_use]
pub fn swap_mib(all: &[&LinuxResources], host_mib: u64) -> u64 {
    let swap = all.iter().map(|it| own_mib(it, host_mib));
    swap.fold(0, u64::saturating_add).min(host_mib)
}

/// The swap that one container may use, in MiB, rounded up.
fn own_mib(resources: &LinuxResources, host_mib: u64) -> u64 {
    let Some(memory) = resources.memory() else { return 0 };
    let Some(limit) = memory.limit().filter(|limit| *limit > 0) else { return 0 };
    match memory.swap() {
        Some(both) if both >= 0 => {
            both.saturating_sub(limit).max(0).cast_unsigned().div_ceil(1 << 20)
        }
        _ => host_mib,
    }
}

/// The swap of this host, in MiB.
#[must_use]
pub fn swap_of_the_host() -> u64 {
    let info = rustix::system::sysinfo();
    mib(info.totalswap, info.mem_unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn swap(all: &[Value], host_mib: u64) -> u64 {
        let read = |memory: &Value| serde_json::from_value(json!({"memory": memory})).unwrap();
        let all: Vec<LinuxResources> = all.iter().map(read).collect();
        swap_mib(&all.iter().collect::<Vec<_>>(), host_mib)
    }

    #[test]
    fn only_what_is_more_than_the_memory_limit_is_swap() {
        const MIB: i64 = 1 << 20;
        assert_eq!(swap(&[json!({"limit": 64 * MIB, "swap": 96 * MIB})], 1024), 32);
        assert_eq!(swap(&[json!({"limit": 64 * MIB, "swap": 64 * MIB + 1})], 1024), 1);
        for none in [
            json!({"limit": 64 * MIB, "swap": 64 * MIB}),
            json!({"limit": 64 * MIB, "swap": 32 * MIB}),
            json!({"limit": -1, "swap": -1}),
            json!({"limit": 0, "swap": 64 * MIB}),
            json!({}),
        ] {
            assert_eq!(swap(&[none], 1024), 0);
        }
    }

    #[test]
    fn there_is_no_more_than_the_host_has() {
        assert_eq!(swap(&[json!({"limit": 5})], 1024), 1024);
        assert_eq!(swap(&[json!({"limit": 5, "swap": -1})], 1024), 1024);
        assert_eq!(swap(&[json!({"limit": 5, "swap": i64::MAX})], 1024), 1024);
        assert_eq!(swap(&[json!({"limit": 5, "swap": 6 << 20})], 0), 0);
        let half = json!({"limit": 1 << 20, "swap": 601 << 20});
        assert_eq!(swap(std::slice::from_ref(&half), 1024), 600);
        assert_eq!(swap(&[half.clone(), json!({}), half], 1024), 1024);
    }
}
