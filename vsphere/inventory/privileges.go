package inventory

import "slices"

// Use is something that vddkcp does on a server and for which it needs privileges.
type Use string

// The values of Use. The value is the text that tells users what a privilege is for.
const (
	UseFind          Use = "finding and describing VMs"
	UseSnapshot      Use = "making and removing snapshots"
	UseVDDK          Use = "reading disks through VDDK or over NFC"
	UseNFC               = UseVDDK // both need the same privileges
	UseTracking      Use = "switching change tracking on"
	UsePowerOff      Use = "powering VMs off"
	UseHTTPS         Use = "reading disks over HTTPS"
	UseLease         Use = "exporting VMs"
	UseEncrypted     Use = "reading encrypted disks"
	UsePrepareAccess Use = "forbidding migrations during a copy (--prepare-access)"
)

// Scope is the kind of objects on which a privilege is needed.
type Scope string

// The values of Scope.
const (
	OnVM        Scope = "VM"
	OnDatastore Scope = "datastore" // each datastore that holds files of the VM
	OnRoot      Scope = "root folder"
)

// Privilege is a privilege that vddkcp needs on the server.
type Privilege struct {
	ID  string // in the API of vSphere, such as "VirtualMachine.State.CreateSnapshot"
	On  Scope
	For Use
}

// Privileges returns the privileges that the given uses need, and those that every use needs.
func Privileges(uses ...Use) []Privilege {
	return slices.DeleteFunc(privileges(), func(p Privilege) bool {
		return p.For != UseFind && !slices.Contains(uses, p.For)
	})
}

// The function privileges returns all privileges that vddkcp ever needs. VMware's documentation of
// backup lists the privileges for snapshots, for reading and for change tracking.
func privileges() []Privilege {
	return []Privilege{
		{"System.Anonymous", OnVM, UseFind},
		{"System.View", OnVM, UseFind},
		{"System.Read", OnVM, UseFind},
		{"VirtualMachine.State.CreateSnapshot", OnVM, UseSnapshot},
		{"VirtualMachine.State.RemoveSnapshot", OnVM, UseSnapshot},
		{"VirtualMachine.Provisioning.DiskRandomRead", OnVM, UseVDDK},
		{"VirtualMachine.Provisioning.GetVmFiles", OnVM, UseVDDK},
		{"VirtualMachine.Config.ChangeTracking", OnVM, UseTracking},
		{"VirtualMachine.Interact.PowerOff", OnVM, UsePowerOff},
		{"Datastore.Browse", OnDatastore, UseHTTPS},
		{"Datastore.FileManagement", OnDatastore, UseHTTPS},
		{"VApp.Export", OnVM, UseLease},
		{"Cryptographer.Access", OnVM, UseEncrypted},
		{"Global.DisableMethods", OnRoot, UsePrepareAccess},
		{"Global.EnableMethods", OnRoot, UsePrepareAccess},
	}
}

// Lacking is a privilege that the user of a session does not have on an object.
type Lacking struct {
	Privilege
	Object string // name of the object; "" for the root folder
}
