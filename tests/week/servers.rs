//! Servers that are used by their own tools: memcached, HAProxy, RabbitMQ.

use crate::room::{Debian, same};

const MEMCACHED: &str = r#"
memcached -u nobody -m 16 -t 4 -l 127.0.0.1 & server=$!
python3 -c '
import socket, threading, time
def connect():
    for turn in range(300):
        try: return socket.create_connection(("127.0.0.1", 11211))
        except OSError: time.sleep(0.1)
def work(name):
    file = connect().makefile("rwb")
    for n in range(100):
        file.write(b"set %s%d 0 0 5\r\nvalue\r\n" % (name, n)); file.flush(); assert file.readline() == b"STORED\r\n"
        file.write(b"incr counter 1\r\n"); file.flush(); file.readline()
file = connect().makefile("rwb")
file.write(b"set counter 0 0 1\r\n0\r\n"); file.flush(); file.readline()
threads = [threading.Thread(target=work, args=(b"%d-" % n,)) for n in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file.write(b"get counter\r\n"); file.flush(); file.readline()
print("counted", file.readline().decode().strip()); file.readline()
file.write(b"stats\r\n"); file.flush()
print(*(line.split()[2].decode() for line in iter(file.readline, b"END\r\n") if line.split()[1] == b"curr_items"))'
kill $server; wait $server || true
"#;

#[test]
#[ignore = "long: --suite week"]
fn memcached() {
    let right = "counted 400\n401";
    same("memcached", Debian::More, right, |room| room.container("memcached", MEMCACHED).run());
}

const HAPROXY: &str = r#"
cat > /tmp/haproxy.cfg <<END
global
    stats socket /tmp/admin level admin
    master-worker
defaults
    mode http
    timeout connect 20s
    timeout client 60s
    timeout server 60s
frontend web
    bind :80
    default_backend pages
backend pages
    balance roundrobin
    option httpchk GET /
    server a 127.0.0.1:8001 check inter 500ms
    server b 127.0.0.1:8002 check inter 500ms
END
cat > /tmp/server.py <<'END'
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "1"); self.end_headers()
        self.wfile.write(sys.argv[2].encode())
    def log_message(self, *arguments): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
END
cat > /tmp/read.py <<'END'
import collections, sys, time, urllib.request
def read():
    try: return urllib.request.urlopen("http://127.0.0.1/").read().decode()
    except Exception: return "none"
wanted, deadline = set(sys.argv[1:]), time.monotonic() + 60
while True:
    seen = collections.Counter(read() for turn in range(10))
    if set(seen) == wanted or time.monotonic() > deadline: break
    time.sleep(0.2)
print(*sorted(seen))
END
python3 /tmp/server.py 8001 a & a=$!
python3 /tmp/server.py 8002 b & b=$!
haproxy -W -db -f /tmp/haproxy.cfg > /tmp/log 2>&1 & proxy=$!
python3 /tmp/read.py a b
kill $a; python3 /tmp/read.py b
python3 /tmp/server.py 8001 c & a=$!
python3 /tmp/read.py b c
cp /tmp/haproxy.cfg /tmp/with-both; sed -i '/server b/d' /tmp/haproxy.cfg; kill -USR2 $proxy; python3 /tmp/read.py c
kill -TERM $proxy; status=0; wait $proxy || status=$?; echo "ended with $status"; kill $a $b
"#;

#[test]
#[ignore = "long: --suite week"]
fn haproxy() {
    let right = "a b\nb\nb c\nc\nended with 0";
    same("HAProxy", Debian::More, right, |room| room.container("haproxy", HAPROXY).run());
}

const RABBITMQ: &str = r#"
install -d -o rabbitmq /v/rabbit
export RABBITMQ_MNESIA_BASE=/v/rabbit RABBITMQ_LOG_BASE=/tmp
exec rabbitmq-server
"#;
/// Publishes messages, each of which the server has promised to keep; or takes them out.
const MESSAGES: &str = r#"
import pika, sys
channel = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", heartbeat=0)).channel()
channel.queue_declare("queue", durable=True)
if sys.argv[1] == "publish":
    channel.confirm_delivery()
    for n in range(200):
        channel.basic_publish("", "queue", str(n), pika.BasicProperties(delivery_mode=2), mandatory=True)
    print("published 200")
else:
    got = [int(channel.basic_get("queue", auto_ack=True)[2]) for n in range(200)]
    print("got", got == list(range(200)), channel.basic_get("queue")[0])
"#;

#[test]
#[ignore = "long: --suite week"]
fn rabbitmq() {
    let right = "published 200\nSIGKILL: got True None\nstopped";
    same("RabbitMQ, kill -9, restart", Debian::More, right, |room| {
        let server = room.container("rabbitmq", RABBITMQ);
        let ready = "ss -ltn | grep -q ':5672 ' && rabbitmqctl -q await_startup --timeout 100";
        let serve = || server.start_until(ready);
        let messages = |what: &str| server.exec(&format!("python3 -c '{MESSAGES}' {what}"));
        serve();
        let mut did = messages("publish") + "\n";
        server.end_by("KILL");
        serve();
        did += &format!("SIGKILL: {}\n", messages("take"));
        // The container may end before its tool does.
        server.exec("rabbitmqctl -q stop > /dev/null 2>&1 &");
        server.ended_by_itself();
        did + "stopped"
    });
}
