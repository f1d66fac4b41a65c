//! Programs that are built, as developers build them.

use crate::room::{Debian, same};

/// A program of six files with a header that every second one includes.
const C: &str = r#"
mkdir -p /v/project; cd /v/project
echo 'int add(int, int);' > add.h
echo 'int add(int a, int b) { return a + b; }' > add.c
calls=; declared=
for n in $(seq 6); do
    if [ $((n % 2)) = 0 ]; then
        printf '#include "add.h"\nint f%d(void) { return add(%d, 1); }\n' $n $n > f$n.c
    else
        printf '#include <stdio.h>\nint f%d(void) { return snprintf(0, 0, "%%d", %d); }\n' $n $n > f$n.c
    fi
    calls="$calls + f$n()"; declared="$declared int f$n(void);"
done
printf '#include <stdio.h>\n%s\nint main(void) { printf("%%d\\n", 0%s); }\n' "$declared" "$calls" > main.c
cat > Makefile <<'END'
objects = $(patsubst %.c,%.o,$(wildcard *.c))
program: $(objects)
	gcc -o $@ $^
%.o: %.c
	gcc -O1 -MMD -c -o $@ $<
-include $(objects:.o=.d)
END
make -j 4 > out 2>&1 || { cat out; exit 1; }
echo "built: $(grep -c '^gcc' out) commands, $(grep -ci 'skew\|future' out) of the clock"
./program
make -j 4 | sed "s/'//g;s/\`//g"
sed -i 's/a + b/a - b/' add.c
make -j 4 | sort; ./program
touch add.h
echo "rebuilt: $(make -j 4 | grep -c '^gcc') commands"
make -j 4 -q; echo "up to date: $?"
"#;

const C_RIGHT: &str = "built: 9 commands, 0 of the clock
18
make: program is up to date.
gcc -O1 -MMD -c -o add.o add.c
gcc -o program add.o f1.o f2.o f3.o f4.o f5.o f6.o main.o
12
rebuilt: 4 commands
up to date: 0";

#[test]
fn c_with_make() {
    same("a C program, make -j", Debian::Few, C_RIGHT, |room| room.container("c", C).run());
}

const GO: &str = r#"
export GOPATH=/v/go GOCACHE=/v/cache GOFLAGS=-mod=mod GO111MODULE=on GOTOOLCHAIN=local
mkdir -p /v/module/lib; cd /v/module
printf 'module example.local/module\n' > go.mod
printf 'package lib\n\nfunc Twice(n int) int { return n * 2 }\n' > lib/lib.go
printf 'package lib\n\nimport "testing"\n\nfunc TestTwice(t *testing.T) {\n\tif Twice(2) != 4 {\n\t\tt.Fail()\n\t}\n}\n' > lib/lib_test.go
cat > main.go <<'END'
package main

import (
	"example.local/module/lib"
	"fmt"
	"runtime"
	"sync"
)

func main() {
	var group sync.WaitGroup
	var lock sync.Mutex
	sum := 0
	for i := 0; i < 1000; i++ {
		group.Add(1)
		go func(i int) { defer group.Done(); lock.Lock(); sum += lib.Twice(i); lock.Unlock() }(i)
	}
	group.Wait()
	fmt.Println("sum", sum, runtime.NumCPU() > 0)
}
END
go build -o program . && ./program
go vet ./... && go test ./lib | grep -o '^ok'
go build -o program . && ./program
"#;

#[test]
#[ignore = "long: --suite week"]
fn go() {
    let right = "sum 999000 true\nok\nsum 999000 true";
    same("a Go program", Debian::More, right, |room| room.container("go", GO).run());
}

const RUST: &str = r#"
mkdir -p /v/crate; cd /v/crate
printf 'pub fn twice(n: u64) -> u64 { n * 2 }\n#[test] fn right() { assert_eq!(twice(2), 4) }\n' > lib.rs
cat > main.rs <<'END'
use std::thread;
fn main() {
    let threads: Vec<_> = (0..8).map(|n| thread::spawn(move || lib::twice(n))).collect();
    println!("sum {}", threads.into_iter().map(|thread| thread.join().unwrap()).sum::<u64>());
}
END
rustc -O --edition 2021 --crate-type rlib --crate-name lib lib.rs
rustc -O --edition 2021 -C incremental=/v/incremental --extern lib=liblib.rlib main.rs && ./main
echo '// changed' >> main.rs
rustc -O --edition 2021 -C incremental=/v/incremental --extern lib=liblib.rlib main.rs && ./main
rustc --test --edition 2021 -o test lib.rs && ./test | grep -o 'test result: ok. 1 passed'
"#;

#[test]
#[ignore = "long: --suite week"]
fn rust() {
    let right = "sum 56\nsum 56\ntest result: ok. 1 passed";
    same("a Rust program", Debian::More, right, |room| room.container("rust", RUST).run());
}
