package vddk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

const mib = 1 << 20

// readBoth reads the disk with several concurrent readers and compares it with content. One half is
// read into buffers of the disk, the other half into other memory.
func readBoth(t *testing.T, d *Disk, content []byte) error {
	t.Helper()
	var wg sync.WaitGroup
	offs := make(chan int64, len(content)/mib+1)
	for off := int64(0); off < int64(len(content)); off += mib {
		offs <- off
	}
	close(offs)
	var first atomic.Pointer[error]
	for range 8 {
		wg.Go(func() {
			for off := range offs {
				n := int(min(mib, int64(len(content))-off))
				b, free, err := d.Buffer(t.Context(), n)
				if err != nil {
					first.CompareAndSwap(nil, &err)
					return
				}
				if off/mib%2 == 1 {
					own := make([]byte, n)
					_, err = d.ReadAt(own, off)
					copy(b, own)
				} else {
					_, err = d.ReadAt(b, off)
				}
				if err == nil && !bytes.Equal(b, content[off:off+int64(n)]) {
					err = fmt.Errorf("[%d, +%d) differs", off, n)
				}
				if err != nil {
					first.CompareAndSwap(nil, &err)
				}
				free()
			}
		})
	}
	wg.Wait()
	if err := first.Load(); err != nil {
		return *err
	}
	return nil
}

func TestFaults(t *testing.T) {
	const size = 12 * mib
	for _, test := range []struct {
		name     string
		fault    func(host *fakeHost)
		o        Options
		err      string // part of the error of reading the disk; "" if there is none
		restarts int64
	}{
		{name: "crash", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
		}, o: Options{Connections: 1}, restarts: 1},
		{name: "crash of one in two", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
		}, o: Options{Connections: 2}, restarts: 1},
		{name: "crash at every fifth read", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k%5 == 0, errCrash) }
		}, o: Options{Connections: 2}, restarts: 2},
		{name: "hang", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errHang) }
		}, o: Options{Connections: 1, Timeout: 50 * time.Millisecond}, restarts: 1},
		{name: "always a crash", fault: func(h *fakeHost) {
			h.onRead = func(int, *fakeWorker, uint64, int) error { return errCrash }
		}, o: Options{Retry: fastRetry(3)}, err: "gave up after 3 retries: the VDDK worker was lost during"},
		{name: "always a crash, no progress", fault: func(h *fakeHost) {
			h.onRead = func(int, *fakeWorker, uint64, int) error { return errCrash }
		}, o: Options{Retry: source.RetryOptions{Retries: -1, Timeout: 100 * time.Millisecond, Backoff: func(int) time.Duration { return 10 * time.Millisecond }}}, err: "without progress: the VDDK worker was lost"},
		{name: "no retries", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
		}, o: Options{Connections: 1, Retry: source.RetryOptions{Timeout: time.Minute}}, err: "the VDDK worker was lost during read [ds (1)] a b/a b.vmdk ["},
		{name: "refused reopening", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
			h.onOpen = func(n int, _ *worker.Opened) error {
				return when(n == 2 || n == 3, libraryError(18000, "cannot connect"))
			}
		}, o: Options{Connections: 1}, restarts: 3},
		{name: "reopening refused for good", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
			h.onOpen = func(n int, _ *worker.Opened) error { return when(n >= 2, libraryError(4, "no such file")) }
		}, o: Options{Connections: 1, Retry: fastRetry(3)}, err: "gave up after 3 retries: VDDK: open [ds (1)] a b/a b.vmdk: VixDiskLib_Function: error 4: no such file"},
		{name: "one of two can't be had again", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
			h.onOpen = func(n int, _ *worker.Opened) error { return when(n >= 3, libraryError(18000, "too many")) }
			h.delay = 5 * time.Millisecond
		}, o: Options{Connections: 2}, restarts: -1},
		{name: "no capacity at first", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
			h.onOpen = func(n int, o *worker.Opened) error {
				if n == 2 {
					o.Capacity = 0
				}
				return nil
			}
		}, o: Options{Connections: 1}, restarts: 2},
		{name: "another capacity", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
			h.onOpen = func(n int, o *worker.Opened) error {
				if n > 1 {
					o.Capacity -= 8
				}
				return nil
			}
		}, o: Options{Connections: 1}, err: "opened another disk: before, the disk had 12582912 bytes"},
		{name: "another uuid", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
			h.onOpen = func(n int, o *worker.Opened) error {
				if n > 1 {
					o.UUID = "61 00"
				}
				return nil
			}
		}, o: Options{Connections: 1}, err: `the UUID "60 00", now it has 12582912 bytes and the UUID "61 00"`},
		{name: "out of memory", fault: func(h *fakeHost) {
			h.onRead = func(_ int, w *fakeWorker, _ uint64, sectors int) error {
				return when(sectors > 300, libraryError(2, "out of memory"))
			}
		}, o: Options{Connections: 1}},
		{name: "NFC error 5", fault: func(h *fakeHost) {
			h.onRead = func(_ int, w *fakeWorker, _ uint64, sectors int) error {
				if sectors <= 128 {
					return nil
				}
				w.log(worker.Warning, "NfcFssrvrProcessErrorMsg: received NFC error 5 from server: Failed to allocate the requested 1048600 bytes")
				return libraryError(1, "Unknown error")
			}
		}, o: Options{Connections: 1}},
		{name: "always out of memory", fault: func(h *fakeHost) {
			h.onRead = func(int, *fakeWorker, uint64, int) error { return libraryError(2, "out of memory") }
		}, o: Options{Retry: fastRetry(2)}, err: "gave up after 2 retries: VDDK: read [ds (1)] a b/a b.vmdk ["},
		{name: "some fail", fault: func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error {
				return when(k%4 == 0, libraryError(1, "Unknown error"))
			}
		}, o: Options{Connections: 1}, restarts: -1},
		{name: "a range always fails", fault: func(h *fakeHost) {
			h.onRead = func(_ int, _ *fakeWorker, sector uint64, _ int) error {
				return when(sector == 4096, libraryError(1, "Unknown error"))
			}
		}, o: Options{Retry: fastRetry(4)}, err: "gave up after 4 retries: VDDK: read [ds (1)] a b/a b.vmdk [2097152, 3145728): VixDiskLib_Function: error 1: Unknown error", restarts: -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			host, content := newFakeHost(t, size)
			host.delay = time.Millisecond
			test.fault(host)
			if test.o.Retry.Timeout == 0 && test.o.Retry.Retries == 0 {
				test.o.Retry = fastRetry(-1)
			}
			d := host.mustOpen(Params{Server: "esxi", Snapshot: "snapshot-1"}, test.o)
			err := readBoth(t, d, content)
			if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
				t.Fatalf("got %v, want %q", err, test.err)
			}
			stats := d.Stats()
			if test.err == "" && test.restarts >= 0 && stats.Restarts < test.restarts {
				t.Errorf("%+v, want %d restarts", stats, test.restarts)
			}
			if test.err == "" && stats.Retries == 0 {
				t.Errorf("%+v: nothing was repeated", stats)
			}
			if test.err != "" && strings.Contains(test.err, "another") && !source.IsPermanent(err) {
				t.Errorf("%v is not permanent", err)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
			host.mu.Lock()
			if want := int(d.pool.opener.restarts.Load()); host.cleanups != want {
				t.Errorf("%d calls of Cleanup, want one a restart: %d", host.cleanups, want)
			}
			host.mu.Unlock()
		})
	}
}

func when(yes bool, err error) error {
	if yes {
		return err
	}
	return nil
}

// A buffer stays valid after the end of its worker and after Close.
func TestBufferOutlivesItsWorker(t *testing.T) {
	host, content := newFakeHost(t, 4*mib)
	crash := atomic.Bool{}
	host.onRead = func(int, *fakeWorker, uint64, int) error { return when(crash.CompareAndSwap(true, false), errCrash) }
	d := host.mustOpen(Params{}, Options{Connections: 1, Retry: fastRetry(-1)})
	old, freeOld, err := d.Buffer(t.Context(), mib)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(old, mib); err != nil {
		t.Fatal(err)
	}
	crash.Store(true)
	if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(old, content[mib:2*mib]) {
		t.Error("the buffer of a lost worker changed")
	}
	if _, err := d.ReadAt(old, 2*mib); err != nil || !bytes.Equal(old, content[2*mib:3*mib]) {
		t.Errorf("reading into the buffer of a lost worker: %v", err)
	}
	young, freeYoung, err := d.Buffer(t.Context(), 100)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(old, content[2*mib:3*mib]) {
		t.Error("the buffer changed with Close")
	}
	freeOld()
	freeOld() // the second call has no effect
	young[99] = 1
	freeYoung()
	host.checkGone()
}

func TestBufferBlocks(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	d := host.mustOpen(Params{}, Options{Connections: 1, Depth: 2})
	var frees []func()
	for range 4 {
		_, free, err := d.Buffer(t.Context(), mib)
		if err != nil {
			t.Fatal(err)
		}
		frees = append(frees, free)
	}
	why := errors.New("no patience")
	ctx, cancel := context.WithCancelCause(t.Context())
	got := make(chan error)
	go func() {
		_, _, err := d.Buffer(ctx, 1)
		got <- err
	}()
	cancel(why)
	if err := <-got; err != why {
		t.Errorf("%v, want the cause", err)
	}
	go func() {
		_, free, err := d.Buffer(t.Context(), 1)
		if err == nil {
			free()
		}
		got <- err
	}()
	// Reads into other memory do not wait for buffers.
	if _, err := d.ReadAt(make([]byte, mib), 0); err != nil {
		t.Error(err)
	}
	frees[0]()
	if err := <-got; err != nil {
		t.Error(err)
	}
	go func() {
		_, free, err := d.Buffer(t.Context(), 1) // gets the buffer that was freed
		if err == nil {
			_, _, err = d.Buffer(t.Context(), 1)
			free() // before the end of the test, which checks that no buffer is in use
		}
		got <- err
	}()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := <-got; !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v, want one that says closed", err)
	}
	for _, free := range frees {
		free()
	}
}

func TestOpenFails(t *testing.T) {
	for _, test := range []struct {
		name      string
		fault     func(*fakeHost)
		o         Options
		err       string
		permanent bool
		hint      string
		starts    int
	}{
		{name: "no such disk", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return libraryError(4, "The file was not found") }
		}, err: "error 4: The file was not found", permanent: true, hint: "DATASTORE", starts: 1},
		{name: "login", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error {
				return libraryError(3014, "Cannot complete login due to an incorrect user name or password")
			}
		}, err: "incorrect user name", permanent: true, hint: "refused the login", starts: 1},
		{name: "thumbprint", fault: func(h *fakeHost) {
			h.onOpen = func(n int, _ *worker.Opened) error {
				h.workers[n-1].log(worker.Warning, "SSL: actual thumbprint=11:22:33 expected=AA:BB")
				return libraryError(1, "Unknown error")
			}
		}, err: "has the thumbprint 11:22:33, expected AA:BB", hint: "--thumbprint", starts: 1},
		{name: "refused", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return libraryError(14009, "The server refused connection") }
		}, err: "error 14009: The server refused connection", hint: "port 443", starts: 1},
		{name: "locked", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return libraryError(13, "You do not have access rights to this file") }
		}, err: "error 13", hint: "--snapshot", starts: 1},
		{name: "crash, always", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return errCrash }
		}, err: "lost during open", starts: 3},
		{name: "crash, no retries", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return errCrash }
		}, o: Options{Retry: source.RetryOptions{Timeout: time.Minute}}, err: "lost during open", starts: 1},
		{name: "hang", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return errHang }
		}, o: Options{Timeout: 10 * time.Millisecond}, err: "no answer within 50ms", starts: 1},
		{name: "no memory", fault: func(h *fakeHost) {
			h.onOpen = func(int, *worker.Opened) error { return libraryError(2, "Memory allocation failed") }
		}, err: "error 2", hint: "<nfcsvc><maxMemory>", starts: 7},
		{name: "no worker program", fault: func(h *fakeHost) {
			h.onStart = func(int) error { return &worker.ProgramError{Tried: []error{errors.New("not embedded")}} }
		}, err: "cannot start vddkcp-vddk-worker", permanent: true, hint: "make", starts: 1},
		{name: "no processes", fault: func(h *fakeHost) {
			h.onStart = func(int) error {
				return &worker.StartError{Err: &os.PathError{Op: "fork/exec", Path: "/x", Err: syscall.EAGAIN}}
			}
		}, err: "fork/exec /x: resource temporarily unavailable", hint: "ulimit -u", starts: 1},
		{name: "no descriptors", fault: func(h *fakeHost) {
			h.onStart = func(int) error { return &worker.StartError{Err: syscall.EMFILE} }
		}, err: "too many open files", hint: "ulimit -n", starts: 1},
		{name: "no descriptors for the library", fault: func(h *fakeHost) {
			h.onStart = func(int) error {
				return &worker.LoadError{Library: "/x.so", Text: "libz.so: cannot open shared object file: Too many open files"}
			}
		}, err: "Too many open files", hint: "ulimit -n", starts: 1},
		{name: "writable without Flush", fault: func(h *fakeHost) { h.lacks = "VixDiskLib_Flush" },
			o: Options{Writable: true}, err: "has no VixDiskLib_Flush", permanent: true, starts: 1},
		{name: "absurd capacity", fault: func(h *fakeHost) { h.opened.Capacity = 1 << 60 }, err: "1152921504606846976 sectors", permanent: true, starts: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, _ := newFakeHost(t, mib)
			test.fault(host)
			if test.o.Retry.Timeout == 0 {
				test.o.Retry = fastRetry(-1)
			}
			_, err := host.open(t.Context(), Params{Server: "esxi"}, test.o)
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Fatalf("%v, want %q", err, test.err)
			}
			if source.IsPermanent(err) != test.permanent || report.Of(err).Transient == test.permanent || !strings.Contains(hintOf(err), test.hint) || test.hint == "" && hintOf(err) != "" {
				t.Errorf("permanent %v, hint %q", source.IsPermanent(err), hintOf(err))
			}
			if host.starts != test.starts {
				t.Errorf("%d workers, want %d", host.starts, test.starts)
			}
			host.checkGone()
		})
	}
}

// A disk that cannot be opened again was open before. The copy continues when the cause is
// removed, and otherwise ends with an error after which another run can resume it.
func TestReopeningRefused(t *testing.T) {
	for _, test := range []struct {
		name string
		code uint64
		line string
		once bool // only one opening fails
	}{
		{name: "file not found", code: 4},
		{name: "invalid parameter", code: 3},
		{name: "not supported", code: 6},
		{name: "certificate", code: 1, line: "actual thumbprint=11:22:33 expected=AA:BB"},
		{name: "read-only file system", code: 1, line: "FileCreateDirectory: /tmp/vmware-root: Read-only file system"},
		{name: "session", code: 14009, line: "the session is not authenticated"},
		{name: "login", code: 3014, once: true},
		{name: "no process", code: 1000},
		{name: "no worker program", code: 1001},
		{name: "library removed", code: 1002},
		{name: "crash", code: 1003},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, mended := range []bool{true, false} {
				host, content := newFakeHost(t, 8*mib)
				host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 5, errCrash) }
				refused := func(n int) bool { return n > 1 && (!mended || n < 5) }
				host.onStart = func(n int) error {
					if !refused(n) {
						return nil
					}
					return map[uint64]error{
						1000: &worker.StartError{Err: syscall.EAGAIN}, 1001: &worker.ProgramError{Tried: []error{os.ErrNotExist}},
						1002: &worker.LoadError{Library: "/x.so", Text: "no such file"},
					}[test.code]
				}
				host.onOpen = func(n int, _ *worker.Opened) error {
					if !refused(n) {
						return nil
					}
					if test.code == 1003 {
						return errCrash
					}
					host.workers[n-1].log(worker.Warning, test.line)
					return libraryError(test.code, "refused")
				}
				retries := -1
				if !mended {
					retries = 6
				}
				d := host.mustOpen(Params{Server: "esxi"}, Options{Connections: 1, Retry: fastRetry(retries)})
				err := readBoth(t, d, content)
				d.Close()
				if mended && !test.once {
					if err != nil {
						t.Error(err)
					}
					continue
				}
				if err == nil || source.IsPermanent(err) || !report.Of(err).Transient {
					t.Errorf("%v: permanent %v, may pass %v", err, source.IsPermanent(err), report.Of(err).Transient)
				}
				if test.once && host.starts != 2 {
					t.Errorf("%d workers were started after the login was refused", host.starts-1)
				}
			}
		})
	}
}

// Log lines about certificates, logins or file systems do not make the failure of one read
// permanent.
func TestLogLinesEndNothing(t *testing.T) {
	for _, line := range []string{
		"vpxa: fault.NotAuthenticated: the session is not authenticated", "cannot write /var/log/vmware/x.log: Read-only file system",
		"SSL Error: certificate verify error 18, ignored", "actual thumbprint=11:22 expected=33:44", "Cannot complete login due to an incorrect user name or password",
		"GetFileName: Cannot create disk spec", "libssl.so.3: cannot open shared object file",
	} {
		host, content := newFakeHost(t, 8*mib)
		host.onRead = func(k int, w *fakeWorker, _ uint64, _ int) error {
			if k != 5 {
				return nil
			}
			w.log(worker.Warning, line)
			return libraryError(1, "Unknown error")
		}
		d := host.mustOpen(Params{Server: "esxi"}, Options{Connections: 2, Retry: fastRetry(-1)})
		if err := readBoth(t, d, content); err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}
}

// If the host has no memory for the buffers of the first connection, smaller buffers are requested.
func TestOpenWithSmallerBuffers(t *testing.T) {
	host, content := newFakeHost(t, mib)
	host.onOpen = func(n int, _ *worker.Opened) error { return when(n < 4, libraryError(2, "Memory allocation failed")) }
	d := host.mustOpen(Params{}, Options{Connections: 1})
	if err := readBoth(t, d, content); err != nil {
		t.Error(err)
	}
	if want := (NFCBuffers{Size: 2 * 64 << 10, Count: 4}); d.pool.opener.buffers != want {
		t.Errorf("%+v, want %+v", d.pool.opener.buffers, want)
	}
}

func TestPrepareAccess(t *testing.T) {
	for _, test := range []struct {
		name           string
		crashAt        int // number of the read that crashes; 0 for none
		openFails      int // number of the worker whose Open fails; the first worker prepares the VM
		cancel         bool
		prepares, ends int
	}{
		{name: "orderly", prepares: 1, ends: 1},
		{name: "crash", crashAt: 2, prepares: 1, ends: 1},
		{name: "cancelled", cancel: true, prepares: 1, ends: 1},
		{name: "opening fails", openFails: 2, prepares: 1, ends: 1},
		{name: "crash, reopening fails", crashAt: 2, openFails: 3, prepares: 1, ends: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, _ := newFakeHost(t, 4*mib)
			host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == test.crashAt, errCrash) }
			host.onOpen = func(n int, _ *worker.Opened) error { return when(n == test.openFails, libraryError(4, "gone")) }
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			connections := 3
			if test.crashAt > 0 {
				connections = 1
			}
			d, err := host.open(ctx, Params{Server: "vc", PrepareAccess: true}, Options{Connections: connections, Retry: fastRetry(-1)})
			if err == nil {
				for range 4 {
					d.ReadAt(make([]byte, 512), 0)
				}
				if test.cancel {
					cancel()
				}
				d.Close()
			} else if test.openFails != 2 {
				t.Fatal(err)
			}
			host.mu.Lock()
			defer host.mu.Unlock()
			if host.prepares != test.prepares || host.endAccess != test.ends {
				t.Errorf("%d times prepared, want %d; ended %d times, want %d", host.prepares, test.prepares, host.endAccess, test.ends)
			}
		})
	}
}
