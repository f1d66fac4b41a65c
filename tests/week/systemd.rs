//! systemd as a container's first process, with ten services.

use serde_json::json;

use crate::room::{Debian, same};

/// Writes the units and becomes systemd.
const INIT: &str = r#"
for n in $(seq 8); do
    printf '[Service]\nExecStart=sleep infinity\nRestart=always\nRestartSec=0\n[Install]\nWantedBy=multi-user.target\n' \
        > /etc/systemd/system/plain$n.service
    systemctl -q enable plain$n
done
cat > /etc/systemd/system/counted.service <<END
[Service]
Type=notify
NotifyAccess=all
ExecStart=/bin/sh -c 'systemd-notify --ready; exec sleep infinity'
DynamicUser=yes
StateDirectory=counted
ProtectSystem=strict
PrivateTmp=yes
MemoryMax=32M
TasksMax=7
[Install]
WantedBy=multi-user.target
END
cat > /etc/systemd/system/asked.socket <<END
[Socket]
ListenStream=127.0.0.1:7000
Accept=yes
[Install]
WantedBy=sockets.target
END
printf '[Service]\nExecStart=echo asked\nStandardOutput=socket\n' > /etc/systemd/system/asked@.service
systemctl -q enable counted asked.socket
systemctl -q mask getty.target console-getty.service systemd-logind.service chrony.service \
    rabbitmq-server.service mariadb.service haproxy.service memcached.service nfs-server.service \
    rpcbind.service rpcbind.socket containerd.service podman.service podman.socket openvpn.service \
    nfs-client.target remote-fs.target epmd.socket epmd.service podman-auto-update.timer \
    podman-auto-update.service podman-restart.service mariadb.socket nfs-blkmap.service
exec /sbin/init
"#;
const ASK: &str = r#"
systemctl is-system-running --wait || true
systemctl --failed --no-legend --plain | cut -d ' ' -f 1
systemctl is-active plain1 plain8 counted asked.socket
python3 -c 'import socket; print(socket.create_connection(("127.0.0.1", 7000)).makefile().read().strip())'
systemctl show -p MemoryMax -p TasksMax counted
cat /sys/fs/cgroup$(systemctl show -p ControlGroup --value counted)/pids.max
pid=$(systemctl show -p MainPID --value counted)
stat -c %u /proc/$pid | sed 's/^6....$/its own user/'; nsenter -t $pid -m sh -c 'touch /usr/x 2> /dev/null || echo protected'
pid=$(systemctl show -p MainPID --value plain1); kill -KILL $pid
tries=0
until new=$(systemctl show -p MainPID --value plain1) && [ $new != 0 ] && [ $new != $pid ]; do
    sleep 0.2; tries=$((tries + 1)); [ $tries -lt 100 ]
done
echo restarted; systemctl stop plain8; systemctl is-active plain8 || true
systemd-run -q --wait --pipe -p MemoryMax=20M -p DynamicUser=yes sh -c 'echo ran as $(id -u | grep -c 6....)'
systemd-run -q --on-active=1s --unit later touch /v/later
tries=0; until [ -e /v/later ]; do sleep 0.2; tries=$((tries + 1)); [ $tries -lt 200 ]; done; echo later
journalctl -q -u counted -o cat | grep -c Started
"#;

const RIGHT: &str = "running
active
active
active
active
asked
MemoryMax=33554432
TasksMax=7
7
its own user
protected
restarted
inactive
ran as 1
later
1";

#[test]
#[ignore = "long: --suite week"]
fn systemd() {
    same("systemd with ten services", Debian::More, RIGHT, |room| {
        let container = room.container("systemd", INIT).privileged().with(|spec| {
            spec["process"]["env"].as_array_mut().unwrap().push(json!("container=oci"));
            for place in ["/run", "/run/lock", "/tmp"] {
                let mount = json!({"destination": place, "type": "tmpfs", "source": "tmpfs"});
                spec["mounts"].as_array_mut().unwrap().push(mount);
            }
        });
        container.start();
        container.until("systemctl list-units");
        let did = container.exec(ASK);
        container.end_by("37"); // SIGRTMIN+3: halt
        did
    });
}
