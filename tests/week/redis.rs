//! Redis with its append-only file and its snapshots on a volume.

use crate::room::{Debian, same};

const SERVER: &str = "mkdir -p /v/data; exec redis-server --dir /v/data --appendonly yes --appendfsync always \
                      --save ''";
const RIGHT: &str = "counted 300, 1000 in a list
benchmark: 4 figures
SIGKILL: counted 300, 1000 in a list, the file is valid
snapshot: OK
SIGTERM: counted 301, 1000 in a list
rewritten: OK, counted 301";

#[test]
#[ignore = "long: --suite week"]
fn redis() {
    same("Redis with persistence, redis-benchmark", Debian::Few, RIGHT, |room| {
        let server = room.container("redis", SERVER);
        let serve = || server.start_until("redis-cli ping | grep -q PONG");
        let kept = || {
            let counter = server.exec("redis-cli get counter");
            format!("counted {counter}, {} in a list", server.exec("redis-cli llen list"))
        };
        serve();
        server.exec("for turn in $(seq 300); do echo incr counter; done | redis-cli");
        server.exec("seq 1000 | sed 's/^/rpush list /' | redis-cli --pipe");
        let mut did = kept() + "\n";
        let benchmark =
            "redis-benchmark --csv -n 200 -c 10 -t set,get,incr,lpop | grep -c '^\"[A-Z]'";
        did += &format!("benchmark: {} figures\n", server.exec(benchmark));
        // A change that was answered is in the file.
        server.end_by("KILL");
        serve();
        did += &format!("SIGKILL: {}, ", kept());
        let check = "redis-check-aof /v/data/appendonlydir/appendonly.aof.manifest | grep -o 'is valid' | uniq";
        did += &format!("the file {}\n", server.exec(check));
        server.exec("redis-cli incr counter");
        did += &format!("snapshot: {}\n", server.exec("redis-cli save"));
        server.end_by("TERM");
        serve();
        did += &format!("SIGTERM: {}\n", kept());
        // A rewrite is a forked process that writes while the server works.
        let rewrite = "redis-cli bgrewriteaof > /dev/null; \
            while redis-cli info persistence | grep -q 'aof_rewrite_in_progress:1\\|scheduled:1'; do sleep 0.1; done; \
            redis-cli info persistence | tr -d '\\r' | sed -n 's/^aof_last_bgrewrite_status:ok/OK/p'";
        did += &format!("rewritten: {}, ", server.exec(rewrite));
        server.end_by("KILL");
        serve();
        did + &format!("counted {}", server.exec("redis-cli get counter"))
    });
}
