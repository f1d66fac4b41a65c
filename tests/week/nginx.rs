//! nginx under load, with files of the volume that change meanwhile.

use crate::room::{Debian, same};

const SERVER: &str = r#"
cat > /tmp/nginx.conf <<END
worker_processes 2;
events {}
http {
    access_log /v/access; error_log /v/error; sendfile on;
    server { listen 80; root /v/site; }
    server { listen 81; location / { proxy_pass http://127.0.0.1:80; } }
}
END
mkdir -p /v/site
exec nginx -c /tmp/nginx.conf -g 'daemon off;'
"#;
/// Prints what `ab` counted.
const LOAD: &str = r"ab -q -k -n 100 -c 8 http://127.0.0.1:$port/file | grep -E '^(Complete|Failed|Non-2xx|Document L)' |
    tr -s ' '; ";
/// Reads a page until it is another.
const CHANGED: &str = r#"python3 -c '
import time, urllib.request
read = lambda: urllib.request.urlopen("http://127.0.0.1/page").read().decode()
until = time.monotonic() + 60
while read() == "old" and time.monotonic() < until: pass
print(read())'"#;

const RIGHT: &str = "Document Length: 200000 bytes
Complete requests: 100
Failed requests: 0
Document Length: 200000 bytes
Complete requests: 100
Failed requests: 0
a page of the host: new, longer
a configuration that was reloaded: 404
rotated: 1 in the new log, 100 at least in the old: yes
SIGQUIT: ended";

#[test]
#[ignore = "long: --suite week"]
fn nginx() {
    same("nginx under load", Debian::Few, RIGHT, |room| {
        let site = room.volume().join("site");
        std::fs::create_dir(&site).unwrap();
        std::fs::write(site.join("file"), vec![b'x'; 200_000]).unwrap();
        std::fs::write(site.join("page"), "old").unwrap();
        let server = room.container("nginx", SERVER);
        server.start_until("ab -q -n 1 http://127.0.0.1/page");
        let mut did = server.exec(&format!("port=80; {LOAD}port=81; {LOAD}")) + "\n";
        let reader = server.spawn(CHANGED);
        std::fs::write(site.join("new"), "new, longer").unwrap();
        std::fs::rename(site.join("new"), site.join("page")).unwrap();
        let read = reader.wait_with_output().unwrap();
        did += &format!("a page of the host: {}", String::from_utf8_lossy(&read.stdout));
        let status = "python3 -c 'import urllib.request as u, urllib.error as e\ntry: \
            print(u.urlopen(\"http://127.0.0.1/page\").status)\nexcept e.HTTPError as error: \
            print(error.code)'";
        let reload = "sed -i 's|root /v/site|root /v/none|' /tmp/nginx.conf; \
            nginx -c /tmp/nginx.conf -s reload; for turn in $(seq 100); do \
            [ $(STATUS) = 200 ] || break; sleep 0.1; done; STATUS"
            .replace("STATUS", status);
        did += &format!("a configuration that was reloaded: {}\n", server.exec(&reload));
        let rotate = format!(
            "mv /v/access /v/access.1; nginx -c /tmp/nginx.conf -s reopen; \
             for turn in $(seq 100); do [ -e /v/access ] && break; sleep 0.1; done; {status} > /dev/null; \
             sleep 0.5; echo \"$(wc -l < /v/access) in the new log, 100 at least in the old: \
             $([ $(wc -l < /v/access.1) -ge 100 ] && echo yes)\""
        );
        did += &format!("rotated: {}\n", server.exec(&rotate));
        server.end_by("QUIT");
        did + "SIGQUIT: ended"
    });
}
