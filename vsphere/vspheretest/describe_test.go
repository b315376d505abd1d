package vspheretest_test

import (
	"crypto/tls"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

func TestParse(t *testing.T) {
	o, err := vspheretest.Parse(`
# a comment
server esxi strict version=7.0.3 idle=30m managed-by=vc.test user=root password='a b'
datacenter DC1
host esx9 dc=DC1 disconnected
datastore 'ds [1]' type=NFS free=10GiB
vm 'it''s 1' disks=2 size=8MiB dc=DC1 folder='a b/c' host=esx9 datastore='ds [1]' power=off template noconfig ft connection=orphaned tools=off version=vmx-7 guest=winG tracking notracking
disk 'it''s 1' size=1MiB image=x.raw zero datastore=ds2 file=a/b.vmdk backing=sparse mode=persistent sharing=s bus=b controller=sata key=k uuid=none lun=l label='Hard disk 7' # the last one
vm twin
vm twin folder=f
snapshot twin 'two words'
nfc profile=esxi703 latency=20ms memory=48MiB connections=52 fragment=64KiB shuffle tls12 pem clear
`, func(file string) string { return "/abs/" + file })
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "server", []any{o.ESXi, o.StrictLogin, o.Version, o.IdleLimit, o.ManagedBy, o.User, o.Password}, []any{true, true, "7.0.3", 30 * time.Minute, "vc.test", "root", "a b"})
	equal(t, "hosts", o.Hosts, []vspheretest.Host{{Name: "esx9", Datacenter: "DC1", Disconnected: true}})
	equal(t, "datastores", o.Datastores, []vspheretest.Datastore{{Name: "ds [1]", Type: "NFS", Free: 10 << 30}})
	equal(t, "datacenters", o.Datacenters, []string{"DC1"})
	disks := o.VMs[0].Disks
	o.VMs[0].Disks = nil
	equal(t, "VM", o.VMs[0], vspheretest.VM{Name: "it's 1", Datacenter: "DC1", Folder: "a b/c", Host: "esx9", Datastore: "ds [1]", Power: "off", Template: true,
		NoConfig: true, FaultTolerant: true, Connection: "orphaned", ToolsStopped: true, Version: "vmx-7", Guest: "winG", ChangeTracking: true, NoTracking: true})
	equal(t, "disks", disks, []vspheretest.Disk{{Size: 8 << 20}, {Size: 8 << 20}, {Size: 1 << 20, Image: "/abs/x.raw", Zero: true, Datastore: "ds2", File: "a/b.vmdk",
		Backing: "sparse", Mode: "persistent", Sharing: "s", Bus: "b", Controller: "sata", KeyID: "k", UUID: "none", LUN: "l", Label: "Hard disk 7"}})
	var hosts nfctest.Options
	o.NFC("esx9", &hosts)
	equal(t, "NFC services", hosts, nfctest.Options{Profile: nfctest.ESXi703, Latency: 20 * time.Millisecond, Memory: 48 << 20, Connections: 52,
		Fragment: 64 << 10, Shuffle: true, MaxTLS: tls.VersionTLS12, PEM: true, NoSSL: true})
	equal(t, "snapshots of the first twin", len(o.VMs[1].Snapshots), 0)
	equal(t, "snapshots of the last twin", o.VMs[2].Snapshots, []string{"two words"})

	for line, want := range map[string]string{
		"vm":                   `line 1: "vm" needs a name`,
		"vm a\nvm b fly":       `line 2: the word "fly" has no meaning here`,
		"vm a disks=x":         "line 1: disks=x: ",
		"vm a size=x":          "line 1: size=x: ",
		"server idle=x":        "line 1: idle=x: ",
		"disk a":               `line 1: no VM above is called "a"`,
		"snapshot a b":         "line 1: want: snapshot VM NAME",
		"plane a":              `line 1: a description has no "plane"`,
		"nfc profile=x":        `line 1: no profile of an NFC service is called "x"`,
		"nfc latency=x":        "line 1: latency=x: ",
		"vm 'a":                "line 1: the line \"vm 'a\" has a quote without an end",
		"vm a\ndisk a size=1x": "line 2: size=1x",
	} {
		if _, err := vspheretest.Parse(line, nil); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: error %v, want %s", line, err, want)
		}
	}
}

func TestCommand(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.VM{Name: "web 01", Disks: make([]vspheretest.Disk, 1), Snapshots: []string{"a", "b"}})
	connect(t, s)
	for _, tt := range []struct{ line, output, err string }{
		{line: "snapshots 'web 01'", output: "a\n  b\n"},
		{line: "snapshot 'web 01' c text"},
		{line: "descriptions 'web 01'", output: "a: \nb: \nc: text\n"},
		{line: "files 'web 01'", output: "[ds1] web 01/web 01-000003.vmdk\n"},
		{line: "remove-snapshots 'web 01' b"},
		{line: "snapshots 'web 01'", output: "a\n  c\n"},
		{line: "remove-snapshots 'web 01'"},
		{line: "files 'web 01'", output: "[ds1] web 01/web 01.vmdk\n"},
		{line: "moref 'web 01'", output: s.Find("web 01").Value + "\n"},
		{line: "image 'web 01' 1", output: s.Image("web 01", 1) + "\n"},
		{line: "calls Login", output: "1\n"},
		{line: "fault X soap=NoPermission,PrivilegeId=P times=1 vm='web 01' body=x cut=after"},
		{line: "release X"},
		{line: "clear"},
		{line: "task 'web 01' backup"},
		{line: "release"},
		{line: "settle"},
		{line: "renew-certificate", output: "?"},
		{line: "write 'web 01' 1 512 text"},
		{line: "fill ds1 10GiB"},
		{line: "rename 'web 01' x"},
		{line: "poweroff x"},
		{line: "poweron x"},
		{line: "suspend x"},
		{line: "question x 'Well?'"},
		{line: "quiesce-fails x ApplicationQuiesceFault"},
		{line: "consolidation x"},
		{line: "keep-files x"},
		{line: "move x esx2.test"},
		{line: "revoke A"},
		{line: "grant A"},
		{line: "restart"},
		{line: "sessions"},
		{line: "destroy x"},

		{line: "", err: "no command"},
		{line: "fly", err: `no command is called "fly"`},
		{line: "moref", err: "usage: moref VM"},
		{line: "moref nobody", err: `moref: vspheretest: 0 VMs are called "nobody"`},
		{line: "fill nowhere 1", err: `fill: vspheretest: there is no datastore "nowhere"`},
		{line: "fault X soap=Nonsense", err: `fault: the API has no type "Nonsense"`},
		{line: "fault X soap=VirtualDisk", err: "fault: VirtualDisk is not a fault"},
		{line: "fault X soap=NoPermission,Object=x", err: `fault: NoPermission has no field "Object" that is text`},
		{line: "fault X fly", err: `fault: the word "fly" has no meaning here`},
		{line: "fault X cut=now", err: "fault: cut=now"},
	} {
		words, err := vspheretest.Words(tt.line)
		if err != nil {
			t.Fatal(err)
		}
		output, err := s.Command(words...)
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.err)) {
			t.Errorf("%s: error %v, want %q", tt.line, err, tt.err)
		}
		if output != tt.output && (tt.output != "?" || output == "") {
			t.Errorf("%s: output %q, want %q", tt.line, output, tt.output)
		}
	}
}

// A command that fails leaves the VM unlocked.
func TestCommandUnlocks(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	for _, words := range [][]string{{"image", "web01", "7"}, {"move-datastore", "web01", "nowhere"}, {"snapshots", "web01"}} {
		if _, err := s.Command(words...); (err != nil) != (words[0] != "snapshots") {
			t.Errorf("%v: %v", words, err)
		}
	}
}
