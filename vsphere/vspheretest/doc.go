// Package vspheretest gives tests a simulated vCenter server with the VMs that they describe:
//
//	s := vspheretest.New(t, vspheretest.WithLibrary(),
//		vspheretest.VM{Name: "web01", Folder: "prod", Disks: []vspheretest.Disk{{Size: 8 << 20}, {Content: data}}})
//	// connect to s.Host, s.Port with s.User, s.Password, s.Thumbprint(); VDDK's library is in s.Library.Dir
//	s.SnapshotNames("web01") // the tree as it is now
//
// The server is the simulator of govmomi, with what the simulator lacks: snapshots give the VM new
// files and keep the old ones, their removal merges the files, change IDs, consolidation, quiesced
// snapshots that fail, privileges that can be revoked, certificates that change. With
// [WithLibrary], a stand-in for VDDK's library serves the disks: reading the file of a snapshot
// gives the content at the time of the snapshot, whatever [Server.Write] has written since.
//
// With [WithNFC], the disks can be read over NFC instead: the server gives tickets for stand-ins for
// the ESXi hosts, which serve the same content and refuse the files that a running VM writes. The
// method [Server.NFC] returns the stand-in for a host. The two options can be combined.
//
// [Server.On] makes calls fail, hang, answer late or lose their answers:
//
//	rule := s.On("CreateSnapshot_Task", vspheretest.Fault{Cut: vspheretest.After, Times: 1})
//	rule := s.On("RemoveSnapshot_Task", vspheretest.Fault{HangTask: true, VM: "web01"})
//	<-rule.Arrived() // the call has come: kill the program under test, end its session ...
//	rule.Release()
//
// Other methods change the server behind the back of the program under test, such as
// [Server.EndSessions], [Server.RenewCertificate], [Server.Restart], [Server.MoveHost] and
// [Server.RemoveSnapshotBehindBack].
//
// A server without WithLibrary and WithNFC makes no files for its disks. A thousand VMs take a
// moment then.
package vspheretest
