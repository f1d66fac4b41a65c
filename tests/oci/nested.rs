//! Docker inside a container: Debian's daemon, its bridge, and its containers, as on a host.

use bulkhead_tests::netns::Wired;
use bulkhead_tests::runtime::{Runtime, told};
use bulkhead_tests::tools;
use serde_json::json;

/// Makes room for a daemon.
const ROOM: &str = r#"
exec 2>&1
set -e
fails() { echo "FAILED: $1"; tail -n 30 /run/dockerd.log; ls -la /run; exit 1; }
mount -t tmpfs tmpfs /run
mkdir -p /var/lib/docker /var/lib/containerd /etc/docker /run/box/bin
for data in docker containerd; do mount -t tmpfs tmpfs /var/lib/$data; done
"#;

/// Starts a daemon.
const DAEMON: &str = r#"
# dockerd starts one itself, and gives it less time than an emulated machine may need.
containerd > /run/dockerd.log 2>&1 &
containerd=$!
up=0
while [ $up -lt 300 ] && ! [ -S /run/containerd/containerd.sock ]; do
    kill -0 $! || fails "containerd ended"
    up=$((up + 1)); sleep 0.2
done
dockerd --containerd /run/containerd/containerd.sock --storage-driver overlay2 \
    >> /run/dockerd.log 2>&1 &
dockerd=$!
up=0
while [ $up -lt 300 ] && ! timeout 20 docker version > /dev/null 2>&1; do
    kill -0 $! || fails "the daemon ended"
    up=$((up + 1)); sleep 0.2
done
cp /usr/bin/busybox /run/box/bin
for name in sh echo cat ping wget httpd hostname ls; do ln -s busybox /run/box/bin/$name; done
tar -C /run/box -c . | timeout 60 docker import - box > /dev/null || fails import
"#;

/// Runs containers with the daemon.
const CONTAINERS: &str = r#"
timeout 60 docker info --format '{{.Driver}} {{.CgroupVersion}}'
timeout 90 docker run --rm box echo nested || fails run
status=0; timeout 90 docker run --rm box sh -c 'exit 7' || status=$?; echo status $status
timeout 90 docker run --rm --memory 32m box cat /sys/fs/cgroup/memory.max || fails limit
timeout 90 docker run --rm box ping -c 1 -W 20 10.9.0.1 > /dev/null && echo out of the machine
page='echo served > /index.html; exec httpd -f -p 80 -h /'
timeout 90 docker run -d -p 8080:80 --name web box sh -c "$page" > /dev/null || fails web
tries=0
while [ $tries -lt 100 ] && ! timeout 10 busybox wget -q -O - http://127.0.0.1:8080/; do
    tries=$((tries + 1)); sleep 0.1
done
timeout 60 docker exec web hostname > /dev/null && echo executed
timeout 60 docker rm --force web > /dev/null || fails rm
kill $dockerd; wait $dockerd || true
kill $containerd; wait $containerd || true
echo over
"#;

const EXPECTED: &str = "overlay2 2\nnested\nstatus 7\n33554432\nout of the machine\nserved\n\
                        executed\nover\n";

#[test]
#[ignore = "long: --suite oci_long"]
fn a_daemon_inside_has_containers_of_its_own() {
    let wired = Wired::new().unwrap();
    let script = format!("{ROOM}{}{DAEMON}{CONTAINERS}", tools::NEST);
    let bundle = tools::privileged(&script).unwrap().with(|spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": 1_u64 << 30});
    });
    let bundle = wired.pod.of(bundle.unwrap()).unwrap();
    let runtime = Runtime::new().unwrap();
    let (status, out, err) = told(&runtime.run("nested", &bundle).unwrap());
    assert_eq!((status, out.as_str()), (Some(0), EXPECTED), "{err}");
    runtime.assert_clean().unwrap();
}
