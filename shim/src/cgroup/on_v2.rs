//! Converts settings that a specification has in the form of cgroup v1 for a host with v2. As in
//! runc, settings that v2 does not have are left out: leaf weights, realtime.
//!
//! Weights of block I/O are 10 to 1000 in v1. Which file takes them depends on the scheduler:
//! `io.bfq.weight` has nearly that scale, `io.weight` has 1 to 10000
//! (Documentation/admin-guide/cgroup-v2.rst, "IO").

use std::fs;
use std::path::Path;

use oci_spec::runtime::LinuxResources;

/// The weight file of the BFQ scheduler.
const BFQ: &str = "io.bfq.weight";
/// The weight file of all other schedulers.
const PLAIN: &str = "io.weight";

/// Converts settings to the form of v2, for the cgroup of this directory.
pub(super) fn settings(resources: &mut LinuxResources, directory: &Path) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_realtime_runtime(None).set_realtime_period(None);
    }
    weights(resources, directory);
}

/// Converts a weight to the value of a file. (libcgroups converts it too, but most values overflow
/// there.)
fn weights(resources: &mut LinuxResources, directory: &Path) {
    let Some(mut block_io) = resources.block_io().clone() else { return };
    let bfq = fs::read_to_string(directory.join(BFQ)).ok();
    if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
        let (file, value) = match bfq {
            Some(_) => (BFQ, weight.into()),
            None => (PLAIN, converted(weight)),
        };
        let mut files = resources.unified().clone().unwrap_or_default();
        files.entry(file.to_owned()).or_insert_with(|| value.to_string());
        resources.set_unified(Some(files));
    }
    block_io.set_weight(None).set_leaf_weight(None);
    // Before Linux 5.4 the file has a single number, and none for a device.
    if bfq.is_none_or(|weights| weights.trim().parse::<u32>().is_ok()) {
        block_io.set_weight_device(None);
    }
    resources.set_block_io(Some(block_io));
}

/// Converts a weight from the range 10 to 1000 to the range 1 to 10000.
fn converted(weight: u16) -> u32 {
    1 + u32::from(weight.saturating_sub(10)) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn on_v2(block_io: &Value, bfq: Option<&str>) -> Value {
        let directory = tempfile::tempdir().unwrap();
        if let Some(text) = bfq {
            fs::write(directory.path().join(BFQ), text).unwrap();
        }
        let mut resources = serde_json::from_value(json!({"blockIO": block_io})).unwrap();
        settings(&mut resources, directory.path());
        serde_json::to_value(resources).unwrap()
    }

    #[test]
    fn a_weight_goes_to_the_file_that_the_scheduler_has() {
        let weight = |number: u16| json!({"weight": number});
        for (number, expected) in [(10, "1"), (100, "910"), (1000, "10000"), (5, "1")] {
            assert_eq!(on_v2(&weight(number), None)["unified"], json!({PLAIN: expected}));
        }
        assert_eq!(on_v2(&weight(100), Some("default 100\n"))["unified"], json!({BFQ: "100"}));
        assert_eq!(on_v2(&weight(0), None)["unified"], Value::Null);
    }

    #[test]
    fn what_v2_does_not_have_is_left_out_and_the_rest_stays() {
        let device = json!([{"major": 8, "minor": 0, "weight": 100}]);
        let rate = json!([{"major": 8, "minor": 0, "rate": 100}]);
        let all = json!({"leafWeight": 5, "weightDevice": device, "throttleReadBpsDevice": rate});
        let rates = json!({"throttleReadBpsDevice": rate});
        assert_eq!(on_v2(&all, None)["blockIO"], rates);
        assert_eq!(on_v2(&all, Some("100\n"))["blockIO"], rates);
        let with_devices = json!({"weightDevice": device, "throttleReadBpsDevice": rate});
        assert_eq!(on_v2(&all, Some("default 100\n"))["blockIO"], with_devices);
    }
}
