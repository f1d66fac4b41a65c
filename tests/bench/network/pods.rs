//! The contenders, all on one bridge and with the same programs, and the measuring namespace.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::bundle::{Bundle, install};
use bulkhead_tests::runtime::{Runtime, output};
use bulkhead_tests::vm::dist;
use serde_json::json;

const BRIDGE: &str = "bench";
/// The measuring namespace.
const FAR: &str = "far";
/// The bridge port that leads there; its traffic is counted.
pub(super) const FAR_PORT: &str = "far0";
const FAR_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The name of the tap of a QEMU machine.
const TAP: &str = "tap";
/// The path of the near end in every contender.
const PROGRAM: &str = "/bin/bench";
const IPERF: &str = "/usr/bin/iperf3";
/// The command that every contender runs.
const SERVE: &str = "iperf3 -s >/dev/null & /bin/bench near";

/// A bridge of the host and the measuring namespace; both are removed when this is dropped.
pub(super) struct Bridge;

impl Bridge {
    pub(super) fn new() -> Result<Self> {
        let bridge = Self;
        ip(&format!("link add {BRIDGE} type bridge"))?;
        ip(&format!("link set {BRIDGE} up"))?;
        namespace(FAR, FAR_PORT, FAR_ADDRESS)?;
        Ok(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // These fail for what was not created.
        let _ = ip(&format!("netns delete {FAR}"));
        let _ = ip(&format!("link delete {BRIDGE}"));
    }
}

/// A command in the measuring namespace.
pub(super) fn far(program: &str) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", FAR, program]).stdin(Stdio::null());
    command
}

fn ip(line: &str) -> Result<()> {
    run("ip", line)
}

fn tc(namespace: &str, line: &str) -> Result<()> {
    run("tc", &format!("-netns {namespace} {line}"))
}

fn run(program: &str, line: &str) -> Result<()> {
    let output = output(Command::new(program).args(line.split(' ')))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {line}: {said}");
    Ok(())
}

/// Makes a network namespace whose `eth0` is connected to the bridge through `port`.
fn namespace(name: &str, port: &str, address: Ipv4Addr) -> Result<()> {
    ip(&format!("netns add {name}"))?;
    ip(&format!("link add {port} type veth peer name eth0 netns {name}"))?;
    ip(&format!("link set {port} master {BRIDGE} up"))?;
    ip(&format!("-netns {name} link set lo up"))?;
    ip(&format!("-netns {name} address add {address}/24 dev eth0"))?;
    ip(&format!("-netns {name} link set eth0 up"))
}

/// Makes a tap in a namespace, and redirects frames between it and `eth0`, as Bulkhead does.
fn join(name: &str) -> Result<()> {
    ip(&format!("-netns {name} tuntap add dev {TAP} mode tap vnet_hdr"))?;
    ip(&format!("-netns {name} link set {TAP} up"))?;
    for (from, to) in [("eth0", TAP), (TAP, "eth0")] {
        tc(name, &format!("qdisc add dev {from} ingress"))?;
        let redirect = format!("matchall action mirred egress redirect dev {to}");
        tc(name, &format!("filter add dev {from} ingress protocol all {redirect}"))?;
    }
    Ok(())
}

/// A container in a prepared namespace; both are removed when this is dropped.
pub(super) struct Container {
    runtime: Runtime,
    name: &'static str,
    bundle: Bundle,
}

impl Container {
    pub(super) fn start(runtime: Runtime, name: &'static str, address: Ipv4Addr) -> Result<Self> {
        let bundle = bundle()?.with(|spec| {
            for entry in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
                if entry["type"] == "network" {
                    entry["path"] = json!(format!("/run/netns/{name}"));
                }
            }
        })?;
        namespace(name, &format!("{name}0"), address)?;
        let container = Self { runtime, name, bundle };
        container.runtime.create(name, &container.bundle)?;
        container.runtime.ok(&["start", name])?;
        Ok(container)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Fails if the container was not created.
        let _ = self.runtime.call(&["delete", "--force", self.name]);
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

/// QEMU's microvm with the guest's kernel, in a namespace like a container's, whose interface is
/// connected to its tap; both are removed when this is dropped.
pub(super) struct Microvm {
    process: Child,
    name: &'static str,
}

impl Microvm {
    /// `options` are those of the network back end.
    pub(super) fn start(
        work: &Path,
        name: &'static str,
        options: &str,
        address: Ipv4Addr,
    ) -> Result<Self> {
        let initramfs = initramfs(work, name, address)?;
        namespace(name, &format!("{name}0"), FAR_ADDRESS)?;
        // Only the machine has the address.
        ip(&format!("-netns {name} address flush dev eth0"))?;
        join(name)?;
        // QEMU's default MAC address is the same in each machine.
        let [.., last] = address.octets();
        let log = fs::File::create(work.join(format!("{name}.log")))?;
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", name, "qemu-system-x86_64"])
            .args(["-M", "microvm,acpi=off,rtc=off,pit=off,pic=off,isa-serial=off"])
            .args(["-accel", "kvm", "-cpu", "host", "-m", "256", "-smp", "1", "-nodefaults"])
            .args(["-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-global", "virtio-mmio.force-legacy=false", "-append"])
            .arg("quiet panic=-1 reboot=t no_timer_check tsc=reliable cryptomgr.notests")
            .arg("-kernel")
            .arg(dist().join("share/bulkhead/vmlinux"))
            .arg("-initrd")
            .arg(initramfs)
            .arg("-netdev")
            .arg(format!("tap,id=net,ifname={TAP},script=no,downscript=no,{options}"))
            .arg("-device")
            .arg(format!("virtio-net-device,netdev=net,mac=52:54:00:00:00:{last:02x}"));
        let process = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let machine = Self { process, name };
        fs::create_dir(machine.cgroup())?;
        fs::write(machine.cgroup().join("cgroup.procs"), machine.process.id().to_string())?;
        Ok(machine)
    }
}

impl Microvm {
    /// A cgroup of its own, as a pod has: the scheduler treats a process that is alone in a cgroup
    /// differently, and the measuring process is in another cgroup.
    fn cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(self.name)
    }
}

impl Drop for Microvm {
    fn drop(&mut self) {
        // Both fail only if QEMU has ended by itself, which it should not.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir(self.cgroup());
        let _ = ip(&format!("netns delete {}", self.name));
    }
}

/// A bundle with both servers. iperf3 maps a file in `/tmp`, so `/tmp` is in memory for every
/// contender.
fn bundle() -> Result<Bundle> {
    let bundle = Bundle::script(SERVE)?;
    let bundle =
        bundle.mount(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}))?;
    let own = std::env::current_exe()?;
    fs::copy(own, bundle.rootfs().join(&PROGRAM[1..])).context(PROGRAM)?;
    install(&bundle.rootfs(), Path::new(IPERF))?;
    Ok(bundle)
}

/// An initramfs with the same files, and an init that does what a runtime and `ip` do for
/// containers.
fn initramfs(work: &Path, name: &str, address: Ipv4Addr) -> Result<PathBuf> {
    let bundle = bundle()?;
    let init = format!(
        "#!/bin/sh\nexport PATH=/bin:/usr/bin\nmount -t devtmpfs devtmpfs /dev\n\
         mount -t proc proc /proc\nip link set lo up\nip address add {address}/24 dev eth0\n\
         ip link set eth0 up\n{SERVE}\n"
    );
    let path = bundle.rootfs().join("init");
    fs::write(&path, init)?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let archive = work.join(format!("{name}.cpio"));
    let mut pack = Command::new("busybox");
    pack.args(["sh", "-c", "find . | busybox cpio -o -H newc"]).current_dir(bundle.rootfs());
    let status = pack.stdout(fs::File::create(&archive)?).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "busybox cpio: {status}");
    Ok(archive)
}
