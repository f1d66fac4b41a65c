//! Python: wheels from a directory, a virtual environment, and gunicorn with its workers.

use crate::room::{Debian, same};

const WORK: &str = r#"
mkdir -p /v/wheels /v/source/small; cd /v/source
cat > setup.py <<'END'
from setuptools import setup, Extension
setup(name="small", version="1.0", packages=["small"], entry_points={"console_scripts": ["small=small:main"]},
      ext_modules=[])
END
cat > small/__init__.py <<'END'
import multiprocessing
def twice(n): return n * 2
def main():
    with multiprocessing.Pool(3) as pool: print("pool", sum(pool.map(twice, range(10))))
def application(environment, start):
    import os
    start("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
END
pip --disable-pip-version-check wheel -q --no-build-isolation --no-deps -w /v/wheels . 2>&1
ls /v/wheels
python3 -m venv --system-site-packages /v/environment
/v/environment/bin/pip --disable-pip-version-check install -q --no-index --find-links /v/wheels small 2>&1
/v/environment/bin/small
/v/environment/bin/pip --disable-pip-version-check show small | grep -E '^(Name|Version)'
cd /v
/v/environment/bin/python -m gunicorn -w 3 -b 127.0.0.1:8000 --pid /tmp/pid small:application > /v/log 2>&1 & master=$!
cat > /tmp/read.py <<'END'
import sys, time, urllib.request
def read(): return urllib.request.urlopen("http://127.0.0.1:8000/").read().decode()
for turn in range(600):
    try: read(); break
    except OSError: time.sleep(0.1)
seen = set()
for turn in range(300):
    seen.add(read())
    if len(seen) == 3: break
print(*seen)
END
workers=$(python3 /tmp/read.py); echo "$workers" | wc -w
# A worker that is killed is replaced, and all are by a SIGHUP.
kill -KILL ${workers%% *}
tries=0; until [ "$(pgrep -c -P $master)" = 3 ] && ! [ -d /proc/${workers%% *} ]; do sleep 0.2; tries=$((tries + 1)); [ $tries -lt 300 ]; done
python3 /tmp/read.py | wc -w
before=$(pgrep -P $master | sort | tr '\n' ' '); kill -HUP $master
tries=0; until [ "$(pgrep -c -P $master)" = 3 ] && ! kill -0 $before 2> /dev/null; do sleep 0.2; tries=$((tries + 1)); [ $tries -lt 300 ]; done
python3 /tmp/read.py | wc -w
kill -TERM $master; wait $master; echo "ended with $?"
"#;

const RIGHT: &str = "small-1.0-py3-none-any.whl
pool 90
Name: small
Version: 1.0
3
3
3
ended with 0";

#[test]
#[ignore = "long: --suite week"]
fn python_and_gunicorn() {
    same("Python, pip, gunicorn", Debian::More, RIGHT, |room| room.container("python", WORK).run());
}
