package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

var testTime = time.Date(2026, 12, 1, 12, 0, 0, 0, time.UTC)

func TestNewOwnSnapshot(t *testing.T) {
	for age, want := range map[time.Duration]snapshotStatus{
		0: snapshotYoung, 24*time.Hour - 1: snapshotYoung, 24 * time.Hour: snapshotOld, 1000 * time.Hour: snapshotOld,
	} {
		m := vsphere.Marked{Node: inventory.Node{Name: "a", Mark: &inventory.Mark{Host: "h"}}, VM: new(vsphere.VM), Path: "/DC0/vm/x", Age: age}
		if s := newOwnSnapshot(m, 24*time.Hour); s.Status != want || s.Host != "h" || s.Age != int64(age/time.Second) || s.Path != "/DC0/vm/x" {
			t.Errorf("%v: %+v, want the status %s", age, s, want)
		}
	}
	if s := newOwnSnapshot(vsphere.Marked{Node: inventory.Node{Mark: new(inventory.Mark)}, VM: new(vsphere.VM)}, 0); s.Status != snapshotOld {
		t.Errorf("with --older-than 0s, a new snapshot is %s", s.Status)
	}
}

// someSnapshots are snapshots of each status.
func someSnapshots() []*ownSnapshot {
	snapshot := func(vm, moref, name string, hours int64, status snapshotStatus) *ownSnapshot {
		return &ownSnapshot{
			VM: vm, Path: "/DC0/vm/" + moref, VMMoref: moref, Name: name, Host: "host\n1", Started: testTime, Age: hours * 3600, Status: status,
		}
	}
	return []*ownSnapshot{
		snapshot("web01", "vm-1", "a", 50, snapshotOld), snapshot("web01", "vm-1", "b", 30, snapshotOld),
		snapshot("twin", "vm-2", "c", 23, snapshotYoung), snapshot("twin", "vm-3", "d", 0, snapshotYoung), snapshot("x", "vm-4", "e", 24, snapshotOld),
	}
}

func TestPrintOwnSnapshots(t *testing.T) {
	all := someSnapshots()
	all[0].Status = snapshotRemoved
	all[1].fail(&inventory.LeftError{VM: "web01", Snapshot: "b", Err: errors.New("no privilege\nx")})
	all[4].fail(&inventory.LeftError{VM: "x", Snapshot: "e", Files: true, Err: errors.New("locked")})
	var out bytes.Buffer
	if err := printOwnSnapshots(&out, all, 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	want := `VM            SNAPSHOT  AGE    MADE ON    STARTED                  STATUS
web01         a         2d 2h  "host\n1"  2026-12-01 12:00:00 UTC  removed
web01         b         1d 6h  "host\n1"  2026-12-01 12:00:00 UTC  not removed: no privilege\nx
/DC0/vm/vm-2  c         23h    "host\n1"  2026-12-01 12:00:00 UTC  younger than 1d: its run may be alive
/DC0/vm/vm-3  d         0s     "host\n1"  2026-12-01 12:00:00 UTC  younger than 1d: its run may be alive
x             e         1d     "host\n1"  2026-12-01 12:00:00 UTC  the snapshot "e" of the VM "x" was removed, but files of it are left, because the disks could not be consolidated: locked
`
	if out.String() != want {
		t.Errorf("got\n%s\nwant\n%s", out.String(), want)
	}
}

// TestRemoveOld checks that cleanup removes old snapshots only, and goes on after a failure.
func TestRemoveOld(t *testing.T) {
	all := someSnapshots()
	left := &inventory.LeftError{VM: "web01", Snapshot: "a", Err: errors.New("no\nprivilege")}
	var removed []string
	err := removeOld(t.Context(), all, func(_ context.Context, s *ownSnapshot) error {
		removed = append(removed, s.Name)
		if s.Name == "a" {
			return left
		}
		return nil
	})
	if want := []string{"a", "b", "e"}; !slices.Equal(removed, want) {
		t.Errorf("removed %q, want %q", removed, want)
	}
	if end := report.Of(err); end.Exit != exit.Failed || end.Hint == "" || printable.Error(err) != `the snapshot "a" of the VM "web01" was not removed: no\nprivilege` {
		t.Errorf("%q, %+v", printable.Error(err), end)
	}
	var states []string
	for _, s := range all {
		states = append(states, s.Name+" "+string(s.Status))
	}
	if want := []string{"a failed", "b removed", "c young", "d young", "e removed"}; !slices.Equal(states, want) {
		t.Errorf("%q, want %q", states, want)
	}
}

func TestRemoveOldEnds(t *testing.T) {
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	all := someSnapshots()
	calls := 0
	err := removeOld(ctx, all, func(context.Context, *ownSnapshot) error {
		calls++
		cancel(stopped)
		return errors.New("anything")
	})
	if err != stopped || calls != 1 || all[0].Status != snapshotFailed || all[1].Status != snapshotOld {
		t.Errorf("%v after %d calls, %+v, %+v; want %v after 1", err, calls, all[0], all[1], stopped)
	}
}

func TestLogOwnSnapshots(t *testing.T) {
	for _, c := range []struct {
		all    []*ownSnapshot
		remove bool
		want   string
	}{
		{nil, false, "no snapshot of vddkcp was found"},
		{[]*ownSnapshot{{Status: snapshotOld}, {Status: snapshotOld}}, false, "to remove 2 old snapshots, add --remove"},
		{[]*ownSnapshot{{Status: snapshotYoung}, {Status: snapshotRemoved}}, true, "1 snapshot is kept, because"},
		{[]*ownSnapshot{{Status: snapshotYoung}, {Status: snapshotRemoved}}, true, "1 snapshot was removed"},
	} {
		var out bytes.Buffer
		logOwnSnapshots(slog.New(slog.NewTextHandler(&out, nil)), c.all, c.remove)
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("%s, want %q", out.String(), c.want)
		}
	}
}

func TestShortDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 1500 * time.Millisecond: "1s", time.Minute: "1m", 90 * time.Minute: "1h 30m", 24 * time.Hour: "1d",
		49*time.Hour + time.Minute + time.Second: "2d 1h", time.Hour + time.Second: "1h 1s",
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
