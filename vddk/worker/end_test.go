package worker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

func TestDeaths(t *testing.T) {
	for _, test := range []struct {
		do     string
		signal syscall.Signal
		status int
		killed bool
		reason string
	}{
		{do: "Async=abort", signal: syscall.SIGABRT},
		{do: "Async=segfault", signal: syscall.SIGSEGV},
		{do: "Async=panic", signal: syscall.SIGABRT, reason: "ASSERT stub.c:42 bugNr=7"},
		{do: "Async=twice", status: 2, reason: "the library completed a request twice"},
		{do: "Async=stale", status: 2, reason: "the library completed a request twice"},
		{do: "Queue=zero", status: 2, reason: "the library neither queued nor refused an asynchronous request"},
		{do: "Queue=closesocket", status: 0},
		{do: "Open=abort", signal: syscall.SIGABRT},
		{do: "InitEx=segfault", signal: syscall.SIGSEGV},
		{do: "Close=abort", signal: syscall.SIGABRT},
	} {
		t.Run(test.do, func(t *testing.T) {
			ctx := deadline(t)
			p, err := worker.Start(ctx, config(t, nil, "STUB_DO= "+test.do+" "))
			if err == nil {
				t.Cleanup(p.Release)
				_, err = p.Open(ctx, remote)
			}
			if err == nil {
				err = p.Read(ctx, 0, 0, 1)
			}
			if test.do == "Async=stale" && err == nil {
				// A second completion of the first read must not end the second read of the slot.
				if err = p.Read(ctx, 0, 8, 1); err == nil {
					t.Fatal("a read succeeded before its completion")
				}
			}
			if test.do == "Async=twice" && err == nil {
				<-p.Done() // the first completion ends the read, the second one the process
				err = p.Read(ctx, 0, 0, 1)
			}
			if err == nil {
				err = p.Close(ctx)
			}
			var gone *worker.GoneError
			if !errors.As(err, &gone) {
				t.Fatalf("%#v", err)
			}
			if gone.Signal != test.signal || gone.Status != test.status || gone.Killed != test.killed || gone.Reason != test.reason {
				t.Errorf("%+v", gone)
			}
			if state := processState(gone.PID); state != "" {
				t.Errorf("process %d is still there: %s", gone.PID, state)
			}
		})
	}
}

func TestKilledByOthers(t *testing.T) {
	p, _ := open(t, config(t, nil), remote)
	syscall.Kill(p.PID(), syscall.SIGTERM) // a scheduler sends it to all processes, and only the parent may react
	if err := p.Read(deadline(t), 0, 0, 1); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
	syscall.Kill(p.PID(), syscall.SIGKILL)
	<-p.Done()
	var gone *worker.GoneError
	if err := p.Read(deadline(t), 0, 0, 1); !errors.As(err, &gone) || gone.Signal != syscall.SIGKILL || gone.Killed || gone.Closed {
		t.Errorf("%+v", err)
	}
}

func TestEndsAtOnce(t *testing.T) {
	for i := range 10 {
		p, _ := open(t, config(t, nil), remote)
		ctx := deadline(t)
		var wg, ends sync.WaitGroup
		for slot := range 4 {
			wg.Go(func() {
				for {
					err := p.Read(ctx, slot, 0, 2048)
					var gone *worker.GoneError
					if errors.As(err, &gone) {
						break
					}
					if err != nil && !errors.Is(err, worker.ErrBusy) {
						t.Error(err)
						return
					}
				}
				p.Slot(slot)[0] = 1 // the memory is still mapped
			})
		}
		ends.Go(p.Kill)
		ends.Go(p.Kill)
		if i%2 == 0 {
			ends.Go(func() { p.Close(ctx) })
			ends.Go(func() { p.Close(ctx) })
		}
		ends.Wait()
		wg.Wait()
		p.Release()
		if s := processState(p.PID()); s != "" {
			t.Errorf("the process is still there: %s", s)
		}
	}
}

// A worker that ends without reading all requests resets its socket. The messages that it sent
// before must be received.
func TestLastWordsBeforeAReset(t *testing.T) {
	c := config(t, nil, "STUB_DO= Read=unread Read=tell Read=panic ")
	c.Library, c.Version = stub(t, true), 5
	var pid atomic.Int32
	c.Log = func(_ worker.Level, line string) {
		// This delays the receiver until the worker has ended.
		for ctx := deadline(t); line == "about to act in Read" && processState(int(pid.Load())) != "Z" && ctx.Err() == nil; {
			runtime.Gosched()
		}
	}
	p, _ := open(t, c, remote)
	pid.Store(int32(p.PID()))
	var wg sync.WaitGroup
	for slot := range 4 {
		wg.Go(func() {
			var gone *worker.GoneError
			if err := p.Read(deadline(t), slot, 0, 1); !errors.As(err, &gone) || gone.Reason != "ASSERT stub.c:42 bugNr=7" {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Close succeeds even if the library crashes or hangs in Exit.
func TestDeathsInExit(t *testing.T) {
	for _, do := range []string{"Exit=segfault", "Exit=hang"} {
		ctx, cancel := context.WithCancel(deadline(t))
		c := config(t, nil, "STUB_DO= "+do+" ")
		c.Log = func(_ worker.Level, line string) {
			if line == "hangs in Exit" {
				cancel()
			}
		}
		p, _ := open(t, c, remote)
		if err := p.Close(ctx); err != nil {
			t.Errorf("%s: %v", do, err)
		}
		var gone *worker.GoneError
		if !errors.As(p.Err(), &gone) || !gone.Closed || gone.Signal == 0 {
			t.Errorf("%s: %+v", do, p.Err())
		}
		cancel()
	}
}

// processState returns the letter of the state of a process, or "" if there is no such process.
func processState(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return string(b[bytes.LastIndexByte(b, ')')+2:][:1])
}

func TestHang(t *testing.T) {
	for _, do := range []string{"Async=hang", "Queue=hang", "Query=hang", "Open=hang", "InitEx=hang", "Close=hang"} {
		t.Run(do, func(t *testing.T) {
			long := deadline(t)
			ctx, cancel := context.WithCancelCause(long)
			cause := errors.New("out of patience")
			c := config(t, nil, "STUB_DO= "+do+" ")
			c.Log = func(_ worker.Level, line string) {
				if strings.HasPrefix(line, "hangs in ") {
					cancel(cause)
				}
			}
			p, err := worker.Start(ctx, c)
			if err == nil {
				t.Cleanup(p.Release)
				_, err = p.Open(ctx, remote)
			}
			if err == nil {
				_, err = p.Query(ctx, 0, 128, 128)
			}
			if err == nil {
				err = p.Read(ctx, 2, 0, 1)
			}
			if err == nil {
				err = p.Close(ctx)
			}
			if !errors.Is(err, cause) {
				t.Fatalf("%v", err)
			}
			if p == nil || do == "Close=hang" {
				return
			}
			if do == "Async=hang" {
				if err := p.Read(long, 2, 0, 1); !errors.Is(err, worker.ErrBusy) {
					t.Errorf("the slot of the lost request: %v", err)
				}
			}
			p.Kill()
			var gone *worker.GoneError
			if err := p.Read(long, 2, 0, 1); !errors.As(err, &gone) && do != "Open=hang" || gone != nil && (gone.Signal != syscall.SIGKILL || !gone.Killed) {
				t.Errorf("after Kill: %v", err)
			}
			p.Slot(3)[4095] = 1 // the memory is still mapped
		})
	}
}

func TestGivenUpReadGivesItsSlotBack(t *testing.T) {
	p, _ := open(t, config(t, nil, "STUB_DO= Async=slow "), remote)
	long := deadline(t)
	for i := range 50 {
		ctx, cancel := context.WithTimeout(long, time.Duration(i*100)*time.Microsecond)
		err := p.Read(ctx, 0, 0, 1)
		cancel()
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		for {
			if err = p.Read(long, 0, uint64(i), 1); !errors.Is(err, worker.ErrBusy) {
				break
			}
			runtime.Gosched()
		}
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p.Slot(0)[:512], pattern(uint64(i), 1)) {
			t.Fatalf("sector %d differs", i)
		}
	}
}

func TestCloseWaitsForRequests(t *testing.T) {
	p, _ := open(t, config(t, nil, "STUB_DO= Async=slow "), remote)
	ctx := deadline(t)
	var wg sync.WaitGroup
	for slot := range 4 {
		wg.Go(func() {
			for {
				var gone *worker.GoneError
				err := p.Read(ctx, slot, 0, 1)
				if errors.Is(err, worker.ErrBusy) || errors.As(err, &gone) && gone.Closed {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	if err := p.Close(ctx); err != nil {
		t.Error(err)
	}
	wg.Wait()
	// Close also waits for a request whose caller has given up.
	p, _ = open(t, config(t, nil, "STUB_DO= Async=slow "), remote)
	gaveUp, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	p.Read(gaveUp, 0, 0, 1)
	if err := p.Close(ctx); err != nil {
		t.Error(err)
	}
}
