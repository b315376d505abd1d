package testlib_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vddk/testlib"
)

// sanitized are the options of a library that finds its own errors.
const sanitized = "--cflags=-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

// driver builds the C program that calls the library, with or without sanitizers.
func driver(t *testing.T, sanitize bool) string {
	t.Helper()
	peer.Need(t, "gcc")
	// The driver leaks memory on purpose, and the leak check does not work in a container.
	t.Setenv("ASAN_OPTIONS", "detect_leaks=0")
	exe := filepath.Join(t.TempDir(), "driver")
	args := []string{"-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-Isrc", "testdata/driver.c", "-o", exe, "-ldl"}
	if sanitize {
		args = append(args, "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
	}
	peer.Run(t, "gcc", args...)
	return exe
}

const diskName = "[ds] vm one/a (1).vmdk"

// content returns a disk of 10 MiB and three sectors. It has data in [2 MiB, 5 MiB) and in the last
// sector, and holes elsewhere.
func content() []byte {
	disk := make([]byte, 10<<20+3*512)
	random := rand.New(rand.NewSource(1))
	random.Read(disk[2<<20 : 5<<20])
	random.Read(disk[len(disk)-512:])
	return disk
}

func writeSparse(t *testing.T, path string, disk []byte) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(disk))); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(disk); at += 4096 {
		block := disk[at:min(at+4096, len(disk))]
		if bytes.Count(block, []byte{0}) == len(block) {
			continue
		}
		if _, err := f.WriteAt(block, int64(at)); err != nil {
			t.Fatal(err)
		}
	}
}

func sum(b []byte) string {
	h := fnv.New64a()
	h.Write(b)
	return fmt.Sprintf("%016x", h.Sum64())
}

// run runs the driver with the library and the words of a command line.
func run(t *testing.T, exe string, l *testlib.Library, words ...string) (stdout []string, stderr string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, append([]string{l.SO()}, words...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	if out.Len() > 0 {
		stdout = strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	}
	return stdout, errs.String(), err
}

var (
	initialise = []string{"log", "init", "6", "5", "-"}
	remote     = words("remote host user secret AA:BB moref=vm-1 snapshot-2 nbdssl:nbd 0 0")
	openIt     = []string{"open", diskName, "4"}
	finish     = words("close disconnect freeparams exit")
	opened     = slices.Concat(initialise, remote, openIt)
)

func words(line string) []string { return strings.Fields(line) }

// whole returns a command line that opens the disk, carries out the commands of line, and ends
// without a violation of rules.
func whole(line string) []string { return slices.Concat(opened, words(line), finish) }

func newLibrary(t *testing.T, conf ...string) *testlib.Library {
	t.Helper()
	l := testlib.New(t, sanitized)
	path := filepath.Join(t.TempDir(), "disk")
	writeSparse(t, path, content())
	l.AddDisk(diskName, path)
	l.Conf(conf...)
	return l
}

func TestLibrary(t *testing.T) {
	exe := driver(t, true)
	disk := content()
	at := func(sector, count int) string { return sum(disk[sector*512 : (sector+count)*512]) }
	last := len(disk)/512 - 1
	enomem := "Failed to allocate the requested"
	noData := bytes.Repeat([]byte{0x77}, 65536) // the content of the driver's buffers before a read

	tests := []struct {
		name   string
		conf   []string
		words  []string
		want   []string // lines of the output, in this order
		stderr string   // text in the standard error
		rules  []string // all rules that are violated
	}{
		{"info", nil, whole("info transport modes metadata"), []string{
			"info capacity=20483 links=1 adapter=3 parent=no sector=512", "transport nbdssl", "modes file:san:hotadd:nbdssl:nbd",
			"metadata 24 adapterType=lsilogic geometry.sectors=63 geometry.heads=255 uuid=60 00 C2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27 virtualHWVersion=14 16052",
			"close 0", "disconnect 0", "exit 0"}, "Open a disk: [ds] vm one/a (1).vmdk", nil},
		{"read", nil, whole("read 4000 200 read 20482 1"), []string{"read 0 " + at(4000, 200), "read 0 " + at(last, 1)}, "", nil},
		{"read async", []string{"threads 1"}, whole("READ 3072 128 64"), []string{"READ 0 " + at(3072, 128*64) + " 64 in order"}, "", nil},
		{"read async out of order", []string{"threads 1", "reorder 50000"}, whole("READ 3072 128 64"), []string{"READ 0 " + at(3072, 128*64) + " 64 overtaken"}, "", nil},
		{"query", nil, whole("query 0 20352 128 query 4096 128 128 query 0 4096 4096"),
			[]string{"query 0 4096+6144", "query 0 4096+128", "query 0"}, "", nil},
		{"query of large chunks", nil, whole("query 0 16384 8192"), []string{"query 0 0+16384"}, "", nil},
		{"prepare", nil, whole("prepare endaccess cleanup check -"), nil, "", nil},
		{"sector size", []string{"logical-sector-size 4096"}, whole("info"), []string{"info capacity=20483 links=1 adapter=3 parent=no sector=4096"}, "", nil},
		{"capacity", []string{"capacity 0x2000000000"}, whole("info read 0x1fffffffff 1"), []string{
			"info capacity=137438953472 links=1 adapter=3 parent=no sector=512", "read 0 " + sum(make([]byte, 512))}, "", nil},
		{"transport", []string{"transport hotadd"}, whole("transport"), []string{"transport hotadd"}, "", nil},
		{"metadata", []string{"metadata uuid a b"}, whole("metadata"), []string{"metadata 24 uuid=a b 16052"}, "", nil},
		{"texts", nil, whole("text 0 text 1 text 3014 text 16007 text 99999"), []string{"text The operation was successful", "text Unknown error",
			"text Insufficient permissions in the host operating system", "text The called function is outside the range of the disk", "text Unknown error"}, "", nil},

		// Errors of the server.
		{"right login", []string{"user user", "password secret", "thumbprint aa:bb", "vm moref=vm-1", "snapshot snapshot-2", "port 443", "nfc-port 902", "server host"},
			whole(""), []string{"open 0"}, "", nil},
		{"wrong user", []string{"user other"}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 3014"}, "incorrect user name or password", nil},
		{"wrong password", []string{"password secret "}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 3014"}, "", nil},
		{"wrong password at open", []string{"password x", "login-at-open", "login-error 0x10bc6"},
			slices.Concat(opened, words("disconnect freeparams exit")), []string{"remote 0", "open 68550"}, "", nil},
		{"wrong cookie", []string{"cookie x"}, slices.Concat(initialise, words("cookie host user y - moref=vm-1 - - 0 0 freeparams exit")), []string{"cookie 3014"}, "", nil},
		{"right cookie", []string{"cookie x"}, slices.Concat(initialise, words("cookie host user x - moref=vm-1 - - 0 0 disconnect freeparams exit")), []string{"cookie 0"}, "", nil},
		{"password for a cookie", []string{"cookie x"}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 3014"}, "", nil},
		{"wrong server", []string{"server other"}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 18000"}, "Host address lookup for server host failed", nil},
		{"wrong port", []string{"port 8443"}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 14009"}, "", nil},
		{"wrong vm", []string{"vm moref=vm-2"}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 4000"}, "Failed to find the VM", nil},
		{"no moref", nil, slices.Concat(initialise, words("remote host u p - vm-1 - - 0 0 freeparams exit")), []string{"remote 3"}, "", nil},
		{"wrong nfc port", []string{"nfc-port 903"}, slices.Concat(opened, words("disconnect freeparams exit")), []string{"open 14009"}, "NBD_ClientOpen: attempting to create connection", nil},
		{"wrong thumbprint", []string{"thumbprint CC:DD"}, slices.Concat(opened, words("disconnect freeparams exit")), []string{"remote 0", "open 1"}, "actual thumbprint=CC:DD expected=AA:BB", nil},
		{"wrong snapshot", []string{"snapshot snapshot-3"}, slices.Concat(opened, words("disconnect freeparams exit")), []string{"open 13003"}, "", nil},
		{"no snapshot", []string{"snapshot snapshot-3"}, slices.Concat(initialise, words("remote host u p - moref=vm-1 - - 0 0"), openIt, words("disconnect freeparams exit")), []string{"open 13"}, "Failed to lock the file", nil},
		{"no such disk", nil, slices.Concat(initialise, remote, []string{"open", "[ds] none.vmdk", "4"}, words("disconnect freeparams exit")), []string{"open 4"}, "A file was not found", nil},
		{"no disk name", nil, slices.Concat(initialise, remote, words("open /etc/passwd 4 disconnect freeparams exit")), []string{"open 4"}, "GetFileName: Cannot create disk spec", nil},
		{"no such transport", nil, slices.Concat(initialise, words("remote host u p - moref=vm-1 - fax 0 0"), openIt, words("disconnect freeparams exit")), []string{"open 13"}, "None of the transport modes", nil},
		{"esxi", []string{"esxi"}, whole("prepare endaccess"), []string{"prepare 6", "endaccess 6"}, "", nil},

		// Resources that the host does not have.
		{"host memory", []string{"host-memory 1"}, slices.Concat(opened, words("cleanup"), []string{"open", diskName, "4", "open", diskName, "4", "open", diskName, "4", "open", diskName, "4"},
			words("close close close"), finish), []string{"open 0", "open 0", "open 0", "open 0", "open 2"}, "NFC error 5 from server: Failed to allocate the requested 262144 bytes", nil},
		{"session memory", []string{"session-memory 0"}, whole(""), []string{"open 0"}, "", nil},
		{"connections", []string{"host-connections 1"}, slices.Concat(opened, openIt, finish), []string{"open 0", "open 1"}, "maximum number of connections", nil},
		{"requests in flight", []string{"in-flight-requests 3", "latency read 50000"}, whole("READ 0 128 4 READ 0 128 3"), []string{"READ 2 ", "READ 0 " + sum(make([]byte, 3*65536)) + " 3 "}, enomem, nil},
		{"bytes in flight", []string{"in-flight-bytes 65535"}, whole("read 0 128 read 0 127"), []string{"read 2 " + sum(noData), "read 0 " + sum(make([]byte, 127*512))}, enomem + " 65536 bytes", nil},

		// Faults that are errors.
		{"fail", []string{"fault Read at=2 do=fail code=7 log=words %s\\n"}, whole("read 0 1 read 0 1 read 0 1"), []string{"read 0 ", "read 7 ", "read 0 "}, "warn: words %s\n", nil},
		{"fail from", []string{"fault Read from=2 do=fail"}, whole("read 0 1 read 0 1 read 0 1"), []string{"read 0 ", "read 1 ", "read 1 "}, "", nil},
		{"fail every", []string{"fault Read every=2 do=fail"}, whole("read 0 1 read 0 1 read 0 1 read 0 1"), []string{"read 0 ", "read 1 ", "read 0 ", "read 1 "}, "", nil},
		{"fail twice", []string{"fault Read times=2 do=fail"}, whole("read 0 1 read 0 1 read 0 1"), []string{"read 1 ", "read 1 ", "read 0 "}, "", nil},
		{"fail first", []string{"fault Read|ReadAsync sectors=first do=fail"}, whole("read 1 1 read 0 1 READ 0 1 1"), []string{"read 0 ", "read 1 ", "READ 1 "}, "", nil},
		{"fail middle", []string{"fault Read sectors=middle do=fail"}, whole("read 10242 1 read 10240 2 read 10241 1"), []string{"read 0 ", "read 1 ", "read 1 "}, "", nil},
		{"fail last", []string{"fault * sectors=last do=fail"}, whole("read 20481 1 read 20400 83"), []string{"read 0 ", "read 1 "}, "", nil},
		{"fail range", []string{"fault Read sectors=10-19 do=fail"}, whole("read 0 10 read 20 1 read 0 11 read 19 1"), []string{"read 0 ", "read 0 ", "read 1 ", "read 1 "}, "", nil},
		{"fail in call", []string{"fault ReadAsync at=1 where=call do=fail code=5"}, whole("READ 0 1 1 READ 0 1 1"), []string{"READ 5 " + sum(noData[:512]) + " 0 ", "READ 0 "}, "", nil},
		{"delay", []string{"fault Read do=delay ms=1"}, whole("read 0 1"), []string{"read 0 "}, "", nil},
		{"log", []string{"fault Open do=log log=\\x41\\e"}, whole(""), []string{"open 0"}, "warn: A\033\n", nil},
		{"twice", []string{"fault ReadAsync at=1 do=twice"}, whole("READ 0 1 2"), []string{"READ 0 " + sum(make([]byte, 1024)) + " 3 "}, "", nil},
		{"corrupt", []string{"fault Read do=corrupt"}, whole("read 0 2"), []string{"read 0 " + sum(append(bytes.Repeat([]byte{0xee}, 512), make([]byte, 512)...))}, "", nil},
		{"overrun", []string{"fault Read do=overrun"}, whole("read 0 2"), []string{"read 0 " + sum(make([]byte, 1024))}, "", nil},
		{"overrun async", []string{"fault ReadAsync at=1 do=overrun"}, whole("READ 0 1 1"), []string{"READ 0 " + sum(make([]byte, 512)) + " 1 "}, "", nil},
		{"bad blocks", []string{"fault QueryAllocatedBlocks at=1 do=badblocks"}, whole("query 128 256 128"), []string{"query 0 384+128 128+0 128+18446744073709551615 127+1"}, "", nil},
		{"no queries", []string{"fault QueryAllocatedBlocks do=fail code=6"}, whole("query 0 128 128"), []string{"query 6"}, "", nil},
		{"late queries", []string{"fault QueryAllocatedBlocks sectors=4096- do=fail code=1"}, whole("query 0 4096 128 query 0 4224 128"), []string{"query 0", "query 1"}, "", nil},
		{"few chunks", []string{"query-max-chunks 2"}, whole("query 0 256 128 query 0 384 128"), []string{"query 0", "query 3"}, "", nil},
		{"fail init", []string{"fault InitEx do=fail"}, words("init 6 5 - "), []string{"init 1"}, "", nil},
		{"fail connect", []string{"fault ConnectEx do=fail code=14009"}, slices.Concat(initialise, remote, words("freeparams exit")), []string{"remote 14009"}, "", nil},
		{"fail others", []string{"fault GetInfo|GetMetadataKeys|PrepareForAccess|EndAccess|Cleanup do=fail code=9"}, whole("info metadata prepare endaccess cleanup"),
			[]string{"info 9", "metadata 9 9 16052", "prepare 9", "endaccess 9", "cleanup 9 0 0"}, "", nil},
		{"close fails once", []string{"fault Close once do=fail"}, whole("close"), []string{"close 1", "close 0"}, "", nil},

		// Logs.
		{"hostile log", []string{"hostile-log"}, whole("loglines"), []string{"loglines "}, "%s %n %d", nil},
		{"flood", []string{"log-flood 500 4", "log-reads"}, whole("read 0 1"), []string{"read 0 "}, "flood: warning 499 of 500", nil},

		// Rules.
		{"init twice", nil, slices.Concat(initialise, words("init 6 5 - exit")), []string{"init 0", "init 1"}, "", []string{"init-twice"}},
		{"not initialised", nil, words("modes"), nil, "", []string{"not-initialised"}},
		{"too new", nil, words("init 9 0 - init 8 0 - exit"), []string{"init 3", "init 0"}, "", nil},
		{"fork", nil, whole("fork"), nil, "", []string{"fork-after-init"}},
		{"open elsewhere", nil, slices.Concat(initialise, remote, []string{"openelsewhere", diskName, "4"}, finish), nil, "", []string{"open-thread"}},
		{"close elsewhere", nil, slices.Concat(opened, words("closeelsewhere disconnect freeparams exit")), nil, "", []string{"close-thread"}},
		{"query elsewhere", nil, whole("queryelsewhere"), nil, "", []string{"query-thread"}},
		{"two opens", []string{"latency open 1000000"}, slices.Concat(initialise, remote, []string{"opentwo", diskName}, finish), nil, "", []string{"open-thread", "concurrent-open"}},
		{"read on the thread of opens", nil, whole("readhere"), []string{"readhere 0"}, "", []string{"io-on-open-thread"}},
		{"two reading threads", nil, whole("read 0 1 readhere"), nil, "", []string{"io-on-open-thread", "io-thread"}},
		{"close busy", []string{"latency read 300000"}, slices.Concat(opened, words("closebusy disconnect freeparams exit")), []string{"closebusy 0"}, "", []string{"close-with-io", "io-on-open-thread"}},
		{"call from callback", nil, whole("CALLBACK 0 1 2"), []string{"CALLBACK 0 "}, "", []string{"call-from-callback"}},
		{"overlap", []string{"latency read 300000"}, whole("OVERLAP 0 1 2"), nil, "", []string{"buffer-overlap"}},
		{"read-only connection", nil, slices.Concat(initialise, remote, []string{"open", diskName, "0"}, words("disconnect freeparams exit")), []string{"open 13"}, "", []string{"read-only-mismatch"}},
		{"write read-only", nil, whole("write 0 1"), []string{"write 11 "}, "", []string{"write-read-only"}},
		{"past the end", nil, whole("read 20482 2 READ 20483 1 1"), []string{"read 16007 ", "READ 16007 "}, "", []string{"io-out-of-range"}},
		{"past all ends", nil, whole("read 0xffffffffffffffff 2"), []string{"read 16007 "}, "", []string{"io-out-of-range"}},
		{"nothing", nil, whole("read 0 0"), []string{"read 3 "}, "", []string{"io-empty"}},
		{"query unaligned", nil, whole("query 64 128 128 query 0 20483 128"), []string{"query 3", "query 3"}, "", []string{"query-unaligned"}},
		{"query past the end", nil, whole("query 0 20608 128"), []string{"query 3"}, "", []string{"query-out-of-range"}},
		{"query of small chunks", nil, whole("query 0 128 64 query 0 192 192"), []string{"query 3", "query 3"}, "", []string{"query-chunk-size"}},
		{"query of too much", []string{"capacity 0x10000000"}, whole("query 0 67108992 128 query 0 67108864 128"), []string{"query 3", "query 0 4096+6144 20480+128"}, "", []string{"query-too-many-chunks"}},
		{"params changed", nil, slices.Concat(initialise, remote, words("changeparams"), openIt, words("restoreparams"), finish), nil, "", []string{"params-changed"}},
		{"free what is not there", nil, whole("freebad"), nil, "", []string{"free-unknown"}},
		{"closed handle", nil, slices.Concat(opened, words("closeagain disconnect freeparams exit")), []string{"closeagain 3"}, "", []string{"bad-handle"}},
		{"disconnect with handle", nil, whole("disconnect"), []string{"disconnect 5", "disconnect 0"}, "", []string{"disconnect-with-handle"}},
		{"leaks", nil, slices.Concat(opened, words("exit")), nil, "", []string{"handle-leaked", "connection-leaked", "memory-leaked"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLibrary(t, tt.conf...)
			l.Allow(tt.rules...)
			if strings.Contains(strings.Join(tt.words, " "), "check -") {
				tt.words[slices.Index(tt.words, "check")+1] = diskName
				tt.want = append(tt.want, "check 0")
			}
			got, stderr, err := run(t, exe, l, tt.words...)
			if err != nil {
				t.Fatalf("driver: %v\n%s\n%s", err, strings.Join(got, "\n"), stderr)
			}
			wantLines(t, got, tt.want)
			if !strings.Contains(stderr, tt.stderr) {
				t.Errorf("no %q in the log\n%s", tt.stderr, stderr)
			}
			for _, rule := range tt.rules {
				if l.Rules()[rule] == 0 {
					t.Errorf("rule %s is not counted: %v", rule, l.Rules())
				}
			}
		})
	}
}

// wantLines checks that lines with these beginnings exist, in this order.
func wantLines(t *testing.T, got, want []string) {
	t.Helper()
	rest := got
	for _, w := range want {
		i := slices.IndexFunc(rest, func(line string) bool { return line == w || strings.HasPrefix(line, w) && strings.HasSuffix(w, " ") })
		if i < 0 {
			t.Errorf("no line %q in order in\n%s", w, strings.Join(got, "\n"))
			return
		}
		rest = rest[i+1:]
	}
}

// A process ends in each way that a fault can cause, in a call or in a completion.
func TestDeaths(t *testing.T) {
	exe := driver(t, false)
	for _, tt := range []struct {
		action string
		signal syscall.Signal
		status int
	}{
		{"abort", syscall.SIGABRT, 0}, {"segv", syscall.SIGSEGV, 0}, {"kill", syscall.SIGKILL, 0}, {"heap", syscall.SIGABRT, 0},
		{"panic", syscall.SIGABRT, 0}, {"exit code=7", 0, 7},
	} {
		for _, fn := range []string{"Read", "ReadAsync", "Open", "QueryAllocatedBlocks"} {
			t.Run(tt.action+" in "+fn, func(t *testing.T) {
				t.Parallel()
				l := testlib.New(t)
				path := filepath.Join(t.TempDir(), "disk")
				writeSparse(t, path, content())
				l.AddDisk(diskName, path)
				l.Conf("fault " + fn + " once do=" + tt.action)
				line := whole("query 0 128 128 read 0 1 READ 0 1 2")
				_, stderr, err := run(t, exe, l, line...)
				var exit *exec.ExitError
				if !errors.As(err, &exit) {
					t.Fatalf("the process lives: %v\n%s", err, stderr)
				}
				status := exit.Sys().(syscall.WaitStatus)
				if tt.status > 0 && status.ExitStatus() != tt.status || tt.status == 0 && status.Signal() != tt.signal {
					t.Fatalf("ended by %v, want signal %v, status %d", exit, tt.signal, tt.status)
				}
				// A fault with "once" acts once in all processes, and the counts of the first
				// process are kept.
				if _, stderr, err := run(t, exe, l, line...); err != nil {
					t.Fatalf("again: %v\n%s", err, stderr)
				}
				if calls := l.Calls(); calls["Open"] != 2 || l.Figures()["faults"] != 1 {
					t.Errorf("calls %v, figures %v", calls, l.Figures())
				}
			})
		}
	}
}

// start starts a driver and waits until it carries out the command "hold".
func start(t *testing.T, exe string, l *testlib.Library, words ...string) (cmd *exec.Cmd, stdin io.WriteCloser) {
	t.Helper()
	cmd = exec.Command(exe, append([]string{l.SO()}, words...)...)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	var text []byte
	buffer := make([]byte, 4096)
	for !bytes.Contains(text, []byte("hold\n")) {
		n, err := out.Read(buffer)
		if err != nil {
			t.Fatalf("before hold: %v\n%s", err, text)
		}
		text = append(text, buffer[:n]...)
	}
	return cmd, stdin
}
