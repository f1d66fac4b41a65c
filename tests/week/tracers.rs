//! Programs that look into others: strace and gdb.

use crate::room::{Debian, same};

const WORK: &str = r#"
exec 2>&1
cd /tmp
cat > program.c <<'END'
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static int depth(int n) { return n == 0 ? getpid() > 0 : depth(n - 1); }
static void *work(void *argument) { *(int *)argument = depth(3); return argument; }
int main(int count, char **arguments) {
    int value = 0; pthread_t thread;
    pthread_create(&thread, 0, work, &value); pthread_join(thread, 0);
    printf("value %d\n", value); fflush(stdout);
    if (count > 1 && fork() == 0) _exit(3);
    if (count > 2) abort();
    return 0;
}
END
gcc -g -O0 -pthread -o program program.c
# A file for each thread, so that no line is cut by another's.
strace -ff -o trace -e trace=execve,write,clone3,exit_group ./program forked
cat trace.* | sed 's/{.*//;s/0x[0-9a-f]*/ADDRESS/g;s/ *= .*//' | grep -E 'write|exit_group|clone3' | sort
strace -c -o counted ./program > /dev/null; grep -c ' ' counted > /dev/null && echo counted
sleep 100 & waited=$!
timeout -s INT 2 strace -p $waited -o attached 2> /dev/null || true
grep -q 'nanosleep\|restart_syscall' attached && echo attached
gdb -q -batch -ex 'break depth if n == 0' -ex run -ex backtrace -ex 'print n' -ex 'info threads' \
    -ex 'watch *(int *)argument' -ex 'delete 1' -ex kill ./program 2> /dev/null |
    sed 's/0x[0-9a-f]*/ADDRESS/g;s/(LWP [0-9]*)//g;s/LWP [0-9]*/LWP/g' | grep -E '^(#[0-4]|\$|Thread .* hit)' | sed 's/argument=ADDRESS/argument/'
gdb -q -batch -p $waited -ex 'info inferiors' 2> /dev/null | grep -c 'process'
kill $waited
ulimit -c unlimited
./program a b > /dev/null 2>&1 || echo "status $?"
core=$(ls core* | head -n 1)
gdb -q -batch -ex backtrace ./program $core 2> /dev/null | grep -E -o 'in (main|abort|__GI_abort|raise)|SIGABRT' | sort -u
gcore -o /tmp/living $$ > /dev/null 2>&1 && ls /tmp/living.* | wc -l
"#;

const RIGHT: &str = r#"value 1
clone3(
exit_group(0)
exit_group(3)
write(1, "value 1\n", 8)
counted
attached
Thread 2 "program" hit Breakpoint 1, depth (n=0) at program.c:6
#0  depth (n=0) at program.c:6
#1  ADDRESS in depth (n=1) at program.c:6
#2  ADDRESS in depth (n=2) at program.c:6
#3  ADDRESS in depth (n=3) at program.c:6
#4  ADDRESS in work (argument) at program.c:7
$1 = 0
2
status 134
SIGABRT
in abort
in main
in raise
1"#;

#[test]
#[ignore = "long: --suite week"]
fn strace_and_gdb() {
    same("strace and gdb", Debian::Few, RIGHT, |room| {
        let container = room.container("tracers", WORK);
        container.with_capability("CAP_SYS_PTRACE").run()
    });
}
