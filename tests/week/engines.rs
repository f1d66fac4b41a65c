//! Engines of containers in a container: Podman, Buildah and containerd. Docker's is in the suite
//! `oci`.

use bulkhead_tests::bundle::install_busybox;
use bulkhead_tests::tools::NEST;

use crate::room::{Debian, Room, same};

/// Puts the root file system of a container into the volume.
fn pack(room: &Room) {
    let applets = ["sh", "echo", "cat", "id", "ls", "sleep"];
    install_busybox(&room.volume().join("box"), &applets).unwrap();
}

/// Says what engines ask before they use an image.
const POLICY: &str = r#"
exec 2>&1
mkdir -p /etc/containers; echo '{"default": [{"type": "insecureAcceptAnything"}]}' > /etc/containers/policy.json
"#;
const PODMAN: &str = r#"
cat > /etc/containers/storage.conf <<END
[storage]
driver = "overlay"
graphroot = "/v/storage"
runroot = "/run/storage"
END
cat > /etc/containers/containers.conf <<END
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
[containers]
log_driver = "k8s-file"
END
mkdir -p /v/context; cp -a /v/box /v/context/box
printf 'FROM scratch\nCOPY box /\nRUN echo built > /file && id -u\nCMD ["cat", "/file"]\n' > /v/context/Dockerfile
buildah build -q --isolation chroot -t one /v/context > /dev/null
podman info --format '{{.Store.GraphDriverName}} {{.Host.CgroupsVersion}}'
podman run --rm --network none one
podman run --rm --network none --memory 32m one cat /sys/fs/cgroup/memory.max
status=0; podman run --rm --network none one sh -c 'exit 7' || status=$?; echo status $status
podman run -d --network none --name kept one sleep 1000 > /dev/null
podman exec kept echo executed; podman ps --format '{{.Names}}'; podman kill kept > /dev/null
podman wait kept; podman rm kept > /dev/null
podman volume create data > /dev/null; podman run --rm --network none -v data:/d one sh -c 'echo x > /d/y'
podman run --rm --network none -v data:/d one cat /d/y
podman run --rm --network none --read-only one sh -c 'echo > /f' 2> /dev/null || echo read-only
buildah push -q one oci-archive:/v/one.tar:one; [ -s /v/one.tar ] && echo pushed
podman rmi -f one > /dev/null; podman load -q -i /v/one.tar > /dev/null; podman images -q | wc -l
"#;
const PODMAN_RIGHT: &str = "overlay v2
built
33554432
status 7
executed
kept
137
x
read-only
pushed
1";

#[test]
#[ignore = "long: --suite week"]
fn podman_and_buildah() {
    let script = format!("{NEST}{POLICY}{PODMAN}");
    same("Podman and Buildah inside", Debian::More, PODMAN_RIGHT, |room| {
        pack(room);
        room.container("podman", &script).privileged().run()
    });
}

const CONTAINERD: &str = r#"
mkdir -p /v/rootfs /v/containerd; cp -a /v/box/. /v/rootfs
cat > /tmp/config.toml <<END
version = 2
root = "/v/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
END
containerd --config /tmp/config.toml > /tmp/log 2>&1 & daemon=$!
tries=0; until ctr version > /dev/null 2>&1; do sleep 0.2; tries=$((tries + 1)); [ $tries -lt 300 ] || { cat /tmp/log; exit 1; }; done
# An image by hand: a configuration, a layer and what lists them.
cd /v; mkdir -p image/blobs/sha256; tar -C rootfs -cf layer .
layer=$(sha256sum < layer | cut -d ' ' -f 1); mv layer image/blobs/sha256/$layer
size() { stat -c %s image/blobs/sha256/$1; }
put() { sum=$(sha256sum < $1 | cut -d ' ' -f 1); mv $1 image/blobs/sha256/$sum; echo $sum; }
printf '{"architecture":"amd64","os":"linux","config":{"Cmd":["echo","from the image"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' $layer > config
config=$(put config)
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:%s","size":%d},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"sha256:%s","size":%d}]}' $config $(size $config) $layer $(size $layer) > manifest
manifest=$(put manifest)
printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:%s","size":%d,"annotations":{"io.containerd.image.name":"local/one:1","org.opencontainers.image.ref.name":"1"}}]}' $manifest $(size $manifest) > image/index.json
echo '{"imageLayoutVersion":"1.0.0"}' > image/oci-layout
tar -C image -cf image.tar .
ctr image import image.tar > /dev/null; ctr image ls -q
ctr run --rm local/one:1 first
status=0; ctr run --rm local/one:1 second sh -c 'exit 7' || status=$?; echo status $status
ctr run -d --memory-limit 33554432 local/one:1 kept sleep 1000
cat /sys/fs/cgroup/default/kept/memory.max; ctr task exec --exec-id e kept echo executed
ctr task ls -q; ctr task kill -s KILL kept; sleep 1; ctr task rm kept > /dev/null 2>&1 || true; ctr container rm kept
ctr snapshot ls | grep -c Committed
kill $daemon; wait $daemon || true; echo over
"#;
const CONTAINERD_RIGHT: &str =
    "local/one:1\nfrom the image\nstatus 7\n33554432\nexecuted\nkept\n1\nover";

#[test]
#[ignore = "long: --suite week"]
fn containerd() {
    let script = format!("{NEST}{POLICY}{CONTAINERD}");
    same("containerd inside", Debian::More, CONTAINERD_RIGHT, |room| {
        pack(room);
        room.container("containerd", &script).privileged().run()
    });
}
