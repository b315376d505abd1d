package progress_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// TestSnapshotBesideACopy takes snapshots while a copy plans work and does it. No
// snapshot may have more done than planned.
func TestSnapshotBesideACopy(t *testing.T) {
	c := new(progress.Counters)
	var wg sync.WaitGroup
	var ended atomic.Bool
	wg.Go(func() {
		for !ended.Load() {
			c.AddPlanned(1)
			c.AddDone(1)
		}
	})
	defer wg.Wait()
	defer ended.Store(true)
	for range 300_000 {
		if s := c.Snapshot(); s.Done > s.Planned {
			t.Fatalf("%d bytes of %d are done", s.Done, s.Planned)
		}
	}
}

// TestRateAfterALoss simulates a copy that repeats work after its target was lost. The
// rate must not become negative.
func TestRateAfterALoss(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(show(t, progress.JSON, func(c *progress.Counters, _ *progress.Display) {
		c.AddPlanned(200 << 20)
		c.Enter(progress.Copy)
		time.Sleep(500 * time.Millisecond) // between the looks of the display
		for range 20 {
			time.Sleep(time.Second)
			c.AddDone(4 << 20)
		}
		time.Sleep(time.Second)
		c.Restart(180 << 20)
		for range 8 {
			time.Sleep(time.Second)
			c.AddDone(4 << 20)
		}
	})), "\n")
	var last progress.Line
	for _, text := range lines {
		var line progress.Line
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatal(err)
		}
		if line.Rate < 0 {
			t.Errorf("a rate of %.0f bytes a second: %s", line.Rate, text)
		}
		last = line
	}
	// The copy made progress in nine of the last ten seconds.
	if last.Rate < 3.0*(1<<20) || last.Rate > 4*(1<<20) {
		t.Errorf("a rate of %.0f bytes a second in the end, of a copy of 4 MiB a second", last.Rate)
	}
}

// TestTimeLeftOfAStalledCopy simulates a copy whose remaining time overflows a
// time.Duration. No remaining time may be shown.
func TestTimeLeftOfAStalledCopy(t *testing.T) {
	out := show(t, progress.Lines, func(c *progress.Counters, _ *progress.Display) {
		c.AddPlanned(64 << 40)
		c.Enter(progress.Copy)
		for range 15 {
			time.Sleep(time.Second)
			c.AddDone(512)
		}
	})
	if out == "" || strings.Contains(out, "left") {
		t.Errorf("64 TiB at 512 bytes a second: %s", out)
	}
}

// TestSnapshotAdd sets each field to 1 and checks that Add doubles it, so that no field is
// forgotten.
func TestSnapshotAdd(t *testing.T) {
	var s progress.Snapshot
	v := reflect.ValueOf(&s).Elem()
	for i := range v.NumField() {
		switch f := v.Field(i); f.Kind() {
		case reflect.Array:
			for j := range f.Len() {
				f.Index(j).SetInt(1)
			}
		default:
			f.SetInt(1)
		}
	}
	s.Add(s)
	if s.Phase != 1 {
		t.Errorf("the phase is %v, want it unchanged", s.Phase)
	}
	for i := range v.NumField() {
		name, f := v.Type().Field(i).Name, v.Field(i)
		if name == "Phase" {
			continue
		}
		if f.Kind() == reflect.Array {
			f = f.Index(f.Len() - 1)
		}
		if f.Int() != 2 {
			t.Errorf("the sum of two fields %s with the value 1 is %d, want 2", name, f.Int())
		}
	}
}
