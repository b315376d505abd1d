package vsphere

import (
	"context"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// About says what a server is.
type About struct {
	Name         string // such as "VMware vCenter Server 8.0.2 build-22617221"
	Version      string // such as "8.0.2"
	Build        string
	VCenter      bool   // the server is a vCenter server; otherwise it is an ESXi host
	InstanceUUID string // of the vCenter server; "" for a host
}

// About returns what the server has said about itself when Connect connected to it. Its texts may
// contain characters that are not safe to show.
func (s *Session) About() About {
	a := s.client.ServiceContent.About
	return About{
		Name: a.FullName, Version: a.Version, Build: a.Build,
		VCenter: s.client.IsVC(), InstanceUUID: a.InstanceUuid,
	}
}

// ManagedBy returns the address of the vCenter server that manages the host, if the server is an
// ESXi host. It is "" for a vCenter server, and for a host that no vCenter server manages.
func (s *Session) ManagedBy(ctx context.Context) (string, error) {
	if s.client.IsVC() {
		return "", nil
	}
	content, err := s.retrieveAll(ctx, []types.PropertySpec{{Type: "HostSystem", PathSet: []string{"summary.managementServerIp"}}})
	if err != nil {
		return "", err
	}
	var hosts []mo.HostSystem
	if err := mo.LoadObjectContent(content, &hosts); err != nil {
		return "", err
	}
	for i := range hosts {
		if ip := hosts[i].Summary.ManagementServerIp; ip != "" {
			return ip, nil
		}
	}
	return "", nil
}
