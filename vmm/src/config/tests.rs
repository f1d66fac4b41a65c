//! Which configurations are valid, and which field an error names.

use std::num::NonZeroU64;

use super::*;

fn valid() -> VmConfig {
    VmConfig {
        version: VERSION,
        jail: JailConfig { uid: 70_000, gid: 70_000 },
        kvm: Fd(0),
        kernel: Fd(1),
        initramfs: Fd(2),
        console: Fd(3),
        cmdline: String::new(),
        vcpus: 1,
        vcpus_max: 2,
        memory_mib: 128,
        devices: vec![SlotDevice { slot: 0, device: DeviceConfig::Vsock { guest_cid: 3 } }],
    }
}

fn blk(serial: &str) -> DeviceConfig {
    DeviceConfig::Blk { disk: Fd(0), read_only: true, serial: serial.into() }
}

fn net(change: fn(&mut NetConfig)) -> DeviceConfig {
    let mac = [2, 0, 0, 0, 0, 1];
    let (receive, transmit) = (RateLimit::default(), RateLimit::default());
    let (taps, vhost) = (vec![Fd(0), Fd(1)], vec![Fd(2), Fd(3)]);
    let mut net = NetConfig { taps, vhost, mac, mtu: 1500, receive, transmit };
    change(&mut net);
    DeviceConfig::Net(net)
}

#[test]
fn a_configuration_survives_json() {
    let mut config = valid();
    config.devices.push(SlotDevice { slot: 12, device: net(|_| {}) });
    let json = serde_json::to_vec(&config).unwrap();
    assert_eq!(VmConfig::from_json(&json, 4).unwrap(), config);
}

#[test]
fn every_bad_field_is_named() {
    type Spoil = fn(&mut VmConfig);
    let table: [(&str, Spoil); 23] = [
        ("version", |c| c.version = 2),
        ("jail.uid", |c| c.jail.uid = 0),
        ("jail.gid", |c| c.jail.gid = u32::MAX),
        ("kvm", |c| c.kvm = Fd(4)),
        ("console", |c| c.console = Fd(200)),
        ("vcpus", |c| c.vcpus = 0),
        ("vcpus", |c| c.vcpus = VCPUS_MAX + 1),
        ("vcpus_max", |c| c.vcpus = 3),
        ("vcpus_max", |c| c.vcpus_max = VCPUS_MAX + 1),
        ("memory_mib", |c| c.memory_mib = MEMORY_MIB_MIN - 1),
        ("cmdline", |c| c.cmdline = "x".repeat(CMDLINE_MAX + 1)),
        ("devices[0].slot", |c| c.devices[0].slot = SLOT_COUNT),
        ("devices[1].slot", |c| c.devices.push(c.devices[0].clone())),
        ("devices[0].guest_cid", |c| c.devices[0].device = DeviceConfig::Vsock { guest_cid: 2 }),
        ("devices[0].serial", |c| c.devices[0].device = blk(&"s".repeat(21))),
        ("devices[0].taps", |c| c.devices[0].device = net(|net| net.taps.clear())),
        ("devices[0].vhost", |c| c.devices[0].device = net(|net| net.vhost.truncate(1))),
        ("devices[0].vhost[1]", |c| c.devices[0].device = net(|net| net.vhost[1] = Fd(4))),
        ("devices[0].vhost", |c| {
            c.devices[0].device = net(|net| net.transmit.packets_per_s = NonZeroU64::new(1));
        }),
        ("devices[0].taps", |c| c.devices[0].device = net(|net| net.taps = vec![Fd(0); 9])),
        ("devices[0].taps[1]", |c| c.devices[0].device = net(|net| net.taps[1] = Fd(4))),
        ("devices[0].mac", |c| c.devices[0].device = net(|net| net.mac[0] = 3)),
        ("devices[0].mtu", |c| c.devices[0].device = net(|net| net.mtu = 67)),
    ];
    for (field, spoil) in table {
        let mut config = valid();
        spoil(&mut config);
        assert_eq!(config.validate(4).unwrap_err().field, field);
    }
}

#[test]
fn an_unknown_field_is_refused() {
    let mut json = serde_json::to_value(valid()).unwrap();
    json["kernel_path"] = "/boot/vmlinux".into();
    let error = VmConfig::from_json(json.to_string().as_bytes(), 4).unwrap_err();
    assert!(error.reason.contains("kernel_path"), "{error}");
}
