package inventory

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestMark(t *testing.T) {
	name := NewName()
	if !OurName(name) || !OurName(name+"/2") || OurName("x"+name) || OurName(name+"/") || OurName("") {
		t.Errorf("OurName is wrong about %q or a similar name", name)
	}
	m := Mark{ID: strings.TrimPrefix(name, "vddkcp-"), Round: 1, Host: "proxy-\"1\"", Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	text := m.String()
	m.Version = 1
	if got := ParseMark(name, text); got == nil || *got != m {
		t.Errorf("ParseMark(%q, %q) = %v, want %v", name, text, got, m)
	}
	if strings.Contains(text, "\n") || strings.Contains(text, "unconsolidated") {
		t.Errorf("description %q", text)
	}
	m.Unconsolidated = true
	if got := ParseMark(name+"/3", m.String()); got == nil || !got.Unconsolidated {
		t.Errorf("ParseMark of a snapshot in round 3 = %v", got)
	}
	for name, description := range map[string]string{
		NewName():   text, // another ID
		"my backup": text,
		name:        "by hand",
		name + "/1": "",
		name + "/2": strings.Replace(text, `"vddkcp":1`, `"vddkcp":2`, 1),
		name + "/4": text + strings.Repeat(" ", 5000),
	} {
		if ParseMark(name, description) != nil {
			t.Errorf("ParseMark(%q, %q) is not nil", name, description)
		}
	}
}

func TestSnapshotDisk(t *testing.T) {
	s := Snapshot{Disks: []Disk{{Key: 2000, UUID: "a"}, {Key: 2001, UUID: "a"}, {Key: 2002}}}
	for _, test := range []struct {
		disk Disk
		want int
	}{
		{Disk{Key: 2000, UUID: "a"}, 0}, {Disk{Key: 2001, UUID: "a"}, 1}, {Disk{Key: 2002}, 2},
		{Disk{Key: 2000, UUID: "b"}, -1}, {Disk{Key: 2003, UUID: "a"}, -1},
	} {
		got := -1
		for i := range s.Disks {
			if s.Disk(&test.disk) == &s.Disks[i] {
				got = i
			}
		}
		if got != test.want {
			t.Errorf("disk %v is disk %d of the snapshot, want %d", test.disk, got, test.want)
		}
	}
}

func TestBusyError(t *testing.T) {
	err := error(&BusyError{VM: "web 01", Name: "vddkcp-00", Mark: &Mark{Host: "proxy1", Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}})
	want := `the VM "web 01" already has the snapshot "vddkcp-00", which vddkcp made on the machine "proxy1" at 2026-01-02T03:04:05Z`
	o := report.Of(errors.Join(err))
	if err.Error() != want || o.Exit != 75 || o.Transient || !strings.HasSuffix(o.Hint, "vddkcp cleanup --remove --older-than 0s 'web 01'") {
		t.Errorf("error %v, outcome %+v", err, o)
	}
}

// TestLeftErrorHint checks that the hint removes the new snapshot, and none of another VM.
func TestLeftErrorHint(t *testing.T) {
	err := &LeftError{VM: "web 01", Snapshot: "vddkcp-00", Err: errors.New("x")}
	if hint := err.Hint(); !strings.HasSuffix(hint, "vddkcp cleanup --remove --older-than 0s 'web 01'") {
		t.Errorf("hint %q", hint)
	}
}

func TestPrivileges(t *testing.T) {
	seen := make(map[string]bool)
	for _, p := range privileges() {
		if seen[p.ID] || p.For == "" || p.On == "" {
			t.Errorf("the privilege %+v is twice in the list or incomplete", p)
		}
		seen[p.ID] = true
	}
	var ids []string
	for _, p := range Privileges(UseSnapshot, UseVDDK) {
		ids = append(ids, p.ID)
	}
	want := "System.Anonymous System.View System.Read VirtualMachine.State.CreateSnapshot VirtualMachine.State.RemoveSnapshot " +
		"VirtualMachine.Provisioning.DiskRandomRead VirtualMachine.Provisioning.GetVmFiles"
	if got := strings.Join(ids, " "); got != want {
		t.Errorf("privileges %s, want %s", got, want)
	}
}
