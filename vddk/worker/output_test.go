package worker_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

func TestHostileLog(t *testing.T) {
	for _, name := range []string{"plain", "sanitized"} {
		t.Run(name, func(t *testing.T) {
			log := &lines{}
			c := config(t, log, "STUB_LOG=5000000")
			if name == "sanitized" {
				c.Program = sanitized(t)
			}
			p, _ := open(t, c, remote)
			if err := p.Read(deadline(t), 0, 0, 1); err != nil {
				t.Fatal(err)
			}
			if err := p.Close(deadline(t)); err != nil {
				t.Fatal(err)
			}
			all := log.all()
			for _, want := range []string{
				"warning: long xxxxx", "xxxxx...\n", "warning: hostile %s %n %d   [31mred  ? end\n", "warning: nul   after\n",
				"warning: stores %hhn here\n", "warning: %n is fine: 7%\n", "warning: (null)\n", "chatter of a thread %s %n ",
			} {
				if !strings.Contains(all, want) {
					t.Errorf("the log lacks %q", want)
				}
			}
			for _, line := range log.list {
				if len(line) > worker.MaxLine+20 {
					t.Errorf("line of %d bytes", len(line))
				}
			}
			lost := 0
			for _, line := range log.list {
				n := 0
				fmt.Sscanf(line, "warning: %d log lines of the library came too fast", &n)
				lost += n
			}
			// The library logs 16000 lines with "chatter". Lines that are dropped after the last
			// line that was received are not counted.
			if got := strings.Count(all, "chatter"); got+lost > 16000+1 || got == 0 {
				t.Errorf("%d lines came, %d were lost", got, lost)
			}
		})
	}
}

// A library that logs never waits for the parent. The parent learns how many lines were dropped.
func TestLogToAParentThatDoesNotListen(t *testing.T) {
	logged := filepath.Join(t.TempDir(), "logged")
	log := &lines{}
	c := config(t, nil, "STUB_LOG=10", "STUB_LOGGED="+logged)
	listen := make(chan struct{})
	c.Log = func(level worker.Level, line string) {
		if strings.HasPrefix(line, "Open") {
			<-listen
		}
		log.add(level, line)
	}
	go func() {
		defer close(listen)
		for ctx := deadline(t); ctx.Err() == nil; runtime.Gosched() {
			if _, err := os.Stat(logged); err == nil {
				return
			}
		}
		t.Error("the library waits for somebody to read its log")
	}()
	p, _ := open(t, c, remote)
	if err := p.Close(deadline(t)); err != nil {
		t.Error(err)
	}
	came, lost := strings.Count(log.all(), "chatter"), 0
	for _, line := range log.list {
		n := 0
		fmt.Sscanf(line, "warning: %d log lines of the library came too fast", &n)
		lost += n
	}
	if lost == 0 || came+lost < 16000 {
		t.Errorf("%d lines came, %d are told lost, of 16000", came, lost)
	}
}

// If the parent is too slow for log lines, completions of reads still arrive.
func TestReadsAmongTheLog(t *testing.T) {
	log := &lines{}
	p, _ := open(t, config(t, log, "STUB_DO= Read=chat "), remote)
	var wg sync.WaitGroup
	for slot := range 4 {
		wg.Go(func() {
			for i := range 50 {
				if err := p.Read(deadline(t), slot, uint64(i), 1); err != nil {
					t.Error(err)
				} else if !bytes.Equal(p.Slot(slot)[:512], pattern(uint64(i), 1)) {
					t.Errorf("sector %d differs", i)
				}
			}
		})
	}
	wg.Wait()
	if err := p.Close(deadline(t)); err != nil {
		t.Error(err)
	}
	if all := log.all(); !strings.Contains(all, "info: Close\n") && !strings.Contains(all, "came too fast") {
		t.Error("neither all lines nor their number")
	}
}

func TestOutput(t *testing.T) {
	log := &lines{}
	p, err := worker.Start(deadline(t), config(t, log, "STUB_DO= InitEx=print InitEx=abort "))
	if err == nil {
		p.Release()
	}
	var gone *worker.GoneError
	if p, err = worker.Start(deadline(t), config(t, log, "STUB_DO= InitEx=print Async=abort ")); err != nil {
		t.Fatal(err)
	}
	defer p.Release()
	p.Open(deadline(t), remote)
	err = p.Read(deadline(t), 0, 0, 1)
	if !errors.As(err, &gone) || !slices.Equal(gone.Last, []string{"printed to stdout", "half a line of stderr", "free(): invalid pointer"}) {
		t.Errorf("%+v", err)
	}
	if all := log.all(); !strings.Contains(all, "output: half a line of stderr\n") || !strings.Contains(all, "output: free(): invalid pointer") {
		t.Error(log.all())
	}
}
