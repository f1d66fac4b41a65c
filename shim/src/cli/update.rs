//! `bulkhead update`: changes a container's limits, in the guest and on the host.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, bail};
use containerd_shim_protos::api::UpdateTaskRequest;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::args::{Global, Update};
use super::client;
use crate::containerd::task::RESOURCES;
use crate::state::Home;
use crate::supervisor::lifecycle::Status;

pub(super) fn update(global: &Global, update: &Update) -> anyhow::Result<()> {
    let home = Home::open(&global.root, &update.id)?;
    if home.read()?.observed() == Status::Stopped {
        bail!("container not running");
    }
    let resources = match &update.resources {
        Some(path) => read(path)?,
        None => from_flags(update)?,
    };
    let mut any = Any::new();
    any.type_url = RESOURCES.to_owned();
    any.value = serde_json::to_vec(&resources)?;
    let request = UpdateTaskRequest {
        id: update.id.to_string(),
        resources: MessageField::some(any),
        ..Default::default()
    };
    client::runtime()?.block_on(async {
        client::connect(&home)?
            .update(client::unbounded(), &request)
            .await
            .map_err(client::words(&home))
    })?;
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<LinuxResources> {
    let json = if path == Path::new("-") {
        let mut json = Vec::new();
        std::io::stdin().read_to_end(&mut json).map(|_| json)
    } else {
        fs::read(path)
    };
    let json = json.with_context(|| format!("--resources {}", path.display()))?;
    serde_json::from_slice(&json).with_context(|| {
        format!("--resources: {} is not a valid linux.resources object", path.display())
    })
}

fn from_flags(update: &Update) -> anyhow::Result<LinuxResources> {
    for (flag, value) in
        [("l3-cache-schema", &update.l3_cache_schema), ("mem-bw-schema", &update.mem_bw_schema)]
    {
        if value.is_some() {
            bail!("--{flag}: classes of Intel RDT are not supported; leave it out");
        }
    }
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(size("memory", update.memory.as_deref())?)
        .set_swap(size("memory-swap", update.memory_swap.as_deref())?)
        .set_reservation(size("memory-reservation", update.memory_reservation.as_deref())?);
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(update.cpu_share)
        .set_quota(update.cpu_quota)
        .set_period(update.cpu_period)
        .set_realtime_runtime(update.cpu_rt_runtime)
        .set_realtime_period(update.cpu_rt_period)
        .set_cpus(update.cpuset_cpus.clone())
        .set_mems(update.cpuset_mems.clone());
    let mut resources = LinuxResources::default();
    resources.set_memory(Some(memory)).set_cpu(Some(cpu));
    if let Some(limit) = update.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
    if update.blkio_weight.is_some() {
        let mut block_io = LinuxBlockIo::default();
        block_io.set_weight(update.blkio_weight);
        resources.set_block_io(Some(block_io));
    }
    Ok(resources)
}

/// Reads a size as people write it: `64m`, `1.5G`, `100000`; -1 for no limit.
fn size(flag: &str, text: Option<&str>) -> anyhow::Result<Option<i64>> {
    let Some(text) = text else { return Ok(None) };
    if text == "-1" {
        return Ok(Some(-1));
    }
    let bytes = || -> Option<i64> {
        let end = text.find(|letter: char| !(letter.is_ascii_digit() || letter == '.'));
        let (number, unit) = text.split_at(end.unwrap_or(text.len()));
        let unit = unit.trim_start().to_ascii_lowercase();
        let unit = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
        let shift = match unit {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            "p" => 50,
            _ => return None,
        };
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        let whole = whole.parse::<i64>().ok()?.checked_mul(1 << shift)?;
        let digits = u32::try_from(part.len()).ok()?;
        let part = i128::from(part.parse::<u32>().ok()?) << shift;
        whole.checked_add(i64::try_from(part / 10_i128.checked_pow(digits)?).ok()?)
    };
    match bytes() {
        Some(bytes) => Ok(Some(bytes)),
        None => bail!("invalid value for {flag}: invalid size: '{text}'; write bytes, 64m or 1.5g"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_what_people_write() {
        for (text, bytes) in [
            ("100000", 100_000),
            ("64m", 64 << 20),
            ("64MiB", 64 << 20),
            ("1.5G", 3 << 29),
            ("2 kb", 2048),
            ("7b", 7),
            ("0", 0),
            ("-1", -1),
        ] {
            assert_eq!(size("memory", Some(text)).unwrap(), Some(bytes), "{text}");
        }
        assert_eq!(size("memory", None).unwrap(), None);
        for text in ["abc", "", "-2", "1x", "1.", "9999999999999p", "1..2", "k"] {
            let error = size("memory", Some(text)).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("invalid value for memory: invalid size: '{text}'"))
            );
        }
    }
}
