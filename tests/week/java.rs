//! A service on the Java virtual machine, which sizes its heap by the container's limit.

use crate::room::{Debian, same};

const SOURCE: &str = r#"
import com.sun.net.httpserver.HttpServer;
import java.net.InetSocketAddress;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;
public class Service {
    static List<byte[]> kept = new ArrayList<>();
    public static void main(String[] arguments) throws Exception {
        Runtime runtime = Runtime.getRuntime();
        System.out.println("heap " + runtime.maxMemory() / (1 << 20) + " MiB");
        HttpServer server = HttpServer.create(new InetSocketAddress(8080), 0);
        server.setExecutor(Executors.newFixedThreadPool(4));
        server.createContext("/", exchange -> {
            byte[][] garbage = new byte[64][];
            for (int i = 0; i < garbage.length; i++) garbage[i] = new byte[256 << 10];
            byte[] answer = ("served " + garbage.length).getBytes();
            exchange.sendResponseHeaders(200, answer.length);
            exchange.getResponseBody().write(answer);
            exchange.close();
        });
        server.createContext("/fill", exchange -> { while (true) kept.add(new byte[1 << 20]); });
        runtime.addShutdownHook(new Thread(() -> System.out.println("ended in order")));
        server.start();
    }
}
"#;
const SERVER: &str = r#"
cd /v; [ -e Service.class ] || javac Service.java
exec java -XX:+ExitOnOutOfMemoryError Service
"#;
const READ: &str = r#"python3 -c '
import sys, urllib.request
try: print(urllib.request.urlopen("http://127.0.0.1:8080" + sys.argv[1]).read().decode())
except Exception as error: print(type(error).__name__)' "#;

/// A quarter of 512 MiB, without the half of the survivors' space that is always empty.
const RIGHT: &str = "heap 123 MiB
5 served 64
attached: java.vm.name
SIGTERM: ended in order
heap 123 MiB
out of memory: status 3";

#[test]
#[ignore = "long: --suite week"]
fn java() {
    same("a service in Java", Debian::More, RIGHT, |room| {
        std::fs::write(room.volume().join("Service.java"), SOURCE).unwrap();
        let server = room.container("java", SERVER).with_memory(512 << 20);
        let ready = format!("{READ} / | grep -q served");
        server.start_until(&ready);
        let many = format!("for turn in $(seq 5); do {READ} /; done | sort | uniq -c");
        let served = server.exec(&many).trim_start().to_owned();
        let mut did = format!("{}\n{served}\n", server.log().lines().next().unwrap());
        let attach = "jcmd Service VM.system_properties | grep -o '^java.vm.name'";
        did += &format!("attached: {}\n", server.exec(attach));
        server.end_by("TERM");
        did += &format!("SIGTERM: {}\n", server.log().lines().last().unwrap());
        drop(server);
        // As the first process that it is, its status is the container's.
        let full = format!(
            "{} & java=$!; until {ready}; do sleep 0.2; done; \
             {READ} /fill > /dev/null; wait $java || echo \"out of memory: status $?\"",
            SERVER.trim().replace("exec ", "").replace('\n', "; ")
        );
        let full = room.container("full", &full).with_memory(512 << 20).run();
        let said = full.lines().filter(|line| line.starts_with("heap") || line.contains("status"));
        did + &said.collect::<Vec<_>>().join("\n")
    });
}
