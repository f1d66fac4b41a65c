//! Node: packages from a registry of the same container, a watcher, a debugger's port.

use crate::room::{Debian, same};

/// A registry with one package that needs another.
const REGISTRY: &str = r#"
const fs = require("fs"), http = require("http"), crypto = require("crypto");
const file = name => fs.readFileSync(`/v/packed/${name}-1.0.0.tgz`);
http.createServer((request, response) => {
    const name = request.url.split("/")[1];
    if (request.url.endsWith(".tgz")) return response.end(file(name));
    if (!["outer", "inner"].includes(name)) { response.statusCode = 404; return response.end("{}"); }
    const integrity = "sha512-" + crypto.createHash("sha512").update(file(name)).digest("base64");
    const version = { name, version: "1.0.0",
        dependencies: name === "outer" ? { inner: "^1.0.0" } : {},
        bin: name === "outer" ? { outer: "run.js" } : undefined,
        dist: { tarball: `http://127.0.0.1:4873/${name}/${name}.tgz`, integrity } };
    response.setHeader("content-type", "application/json");
    response.end(JSON.stringify({ name, "dist-tags": { latest: "1.0.0" }, versions: { "1.0.0": version } }));
}).listen(4873);
"#;
const PACKAGES: &str = r#"
mkdir -p /v/packed /v/source/outer /v/source/inner /v/project
cd /v/source
echo '{"name":"inner","version":"1.0.0","main":"index.js"}' > inner/package.json
echo 'module.exports = n => n * 2;' > inner/index.js
for n in $(seq 100); do echo "module.exports = $n;" > inner/file$n.js; done
echo '{"name":"outer","version":"1.0.0","bin":{"outer":"run.js"},"dependencies":{"inner":"^1.0.0"}}' > outer/package.json
printf '#!/usr/bin/env node\nconsole.log("twice", require("inner")(21));\n' > outer/run.js
for name in outer inner; do
    tar -czf /v/packed/$name-1.0.0.tgz --transform "s/^$name/package/" $name
done
"#;
const WORK: &str = r#"
node /v/registry.js & registry=$!
export npm_config_registry=http://127.0.0.1:4873 npm_config_audit=false npm_config_fund=false \
    npm_config_update_notifier=false
cd /v/project
npm init -y > /dev/null
npm install --silent outer
ls -A node_modules/.bin node_modules; ls node_modules/inner | wc -l
npx --no-install outer
rm -r node_modules; npm ci --silent; npm ls --all | tail -n +2
cat > watcher.js <<'END'
const fs = require("fs"), seen = new Set();
fs.watch("/v/project/watched", { recursive: false }, (kind, name) => {
    if (seen.has(name)) return;
    seen.add(name); console.log("seen", name);
    if (name === "last") process.exit(0);
});
console.log("watches");
END
mkdir watched; node watcher.js > /tmp/seen & watcher=$!
until grep -q watches /tmp/seen; do sleep 0.1; done
for name in first second last; do echo > watched/$name; sleep 0.3; done
wait $watcher; sort /tmp/seen
node -e '
const { Worker } = require("worker_threads"), os = require("os");
const workers = [1, 2, 3].map(n => new Promise(done => new Worker(
    `require("worker_threads").parentPort.postMessage(${n} * 2)`, { eval: true }).on("message", done)));
Promise.all(workers).then(all => console.log("workers", all.join(" "), os.cpus().length > 0));
require("fs").promises.readFile("/v/registry.js").then(file => console.log("read", file.length > 100));
require("child_process").exec("echo child", (error, out) => console.log(out.trim()));' | sort
kill $registry
"#;

const RIGHT: &str = "node_modules:
.bin
.package-lock.json
inner
outer

node_modules/.bin:
outer
102
twice 42
└─┬ outer@1.0.0
  └── inner@1.0.0

seen first
seen last
seen second
watches
child
read true
workers 2 4 6 true";

#[test]
#[ignore = "long: --suite week"]
fn node_and_npm() {
    let script = format!("{PACKAGES}{WORK}");
    same("Node, npm install, a watcher", Debian::More, RIGHT, |room| {
        std::fs::write(room.volume().join("registry.js"), REGISTRY).unwrap();
        room.container("node", &script).run()
    });
}
